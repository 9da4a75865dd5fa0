"""To look into fhopt: what is in a model, what a plan does to it, what every pass changed, how a fit is getting on.

| module | one question |
|---|---|
| `inspection` | which facts are there, of each site and of the whole? Everything that is shown is in its JSON |
| `snapshots` | what did the graph look like after each pass, and what changed? |
| `graphs` | how does a graph become a file: dot, svg, graphml, json? |
| `drawing` | how does one site look before and after? Graphviz lays it out |
| `kernel_listing` | which kernels run, as highlighted text? |
| `charts` | which charts are there? Vega-Lite draws them |
| `report` | how does all of it become one page? |
| `notebook` | how do sites, plans and journals look in a notebook? |
| `progress` | how far is a fit that runs in another process? |
| `server` | how is that served on this machine alone? |
| `explorer`, `model_explorer_extension` | how does Google's Model Explorer read it? |

Only `report`, `drawing` and `server` need the extra `view`.
"""

from fhopt.inspection.drawing import Drawing, draw
from fhopt.inspection.facts import Inspection, inspect

__all__ = ["Drawing", "Inspection", "draw", "inspect"]
