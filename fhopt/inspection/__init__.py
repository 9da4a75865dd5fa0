"""Inspection of models and plans: attention sites, the effect of a plan, changes by each pass, running fits.

| module | contents |
|---|---|
| `facts` | facts of each site and of the whole model; their JSON contains everything that is shown |
| `tables`, `doctor_tables` | tables that commands print |
| `prospects` | what a model would gain from a plan on this machine |
| `snapshots` | the graph after each pass, and what changed |
| `graphs`, `graph_files` | graphs as files: dot, svg, graphml, json |
| `drawing` | one site before and after, laid out by Graphviz |
| `kernel_listing` | the generated kernels as highlighted text |
| `charts` | the charts of a report, drawn by Vega-Lite |
| `plots` | spectrum, bits and sensitivity of a plan, drawn by matplotlib |
| `throughput_plot` | speed and bytes over the context, drawn by matplotlib |
| `html_report` | the report as one HTML page |
| `progress_file` | the progress of a fit that runs in another process |
| `server` | report and progress in a browser, on this machine only |
| `model_explorer`, `model_explorer_extension` | files for Google's Model Explorer |
| `optional` | imports of optional packages |

`html_report`, `drawing` and `kernel_listing` need the extra `report`, `server` the extra `view`.
"""
