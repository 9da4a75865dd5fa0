"""Retrieval LM head: scores all rows with quantized values, and computes exact logits of few rows only.

    loaded = load_model("demo")
    head = fit_head(loaded, HeadOptions())          find the head, collect hidden states, quantize its rows
    head.save("head"); head = Head.load("head")
    apply_head(loaded.module, head)                 generate() as before; the largest logits are certain
    head_report(loaded.module)                      hidden states with a certificate, those of the dense head, bytes
    unapply_head(loaded.module)

The dense head loads every row of the weight for every token. The retrieval head loads quantized values of all rows,
about 4 bits each, which give an upper bound of every logit. Then it loads the exact rows whose bounds reach the largest
exact logit (Cauchy-Schwarz; codegen/cpu/lm_head.py has the equations, fhopt/lm_head/quantize.py the basis that makes
the bounds tight). The largest logits are certain for any hidden state. Hidden states whose bounds exclude too few rows
fall back to the dense head, and are counted. With `probes`, only quantized values of the highest-ranked clusters are
loaded: fewer bytes and no certificate.

Maximum inner-product search with bounds: Ram & Gray 2012, arXiv 1202.6101. Retrieval heads: FlashHead (arXiv
2603.14591).

Dimensions: M hidden states, C their width, R width of the basis, V vocabulary, K clusters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fhopt.import_hook import lazily

if TYPE_CHECKING:
    from fhopt.lm_head.fitting import fit_head as fit_head
    from fhopt.lm_head.head import Head as Head
    from fhopt.lm_head.install import apply_head as apply_head
    from fhopt.lm_head.install import head_report as head_report
    from fhopt.lm_head.install import unapply_head as unapply_head
    from fhopt.lm_head.module import RetrievalHead as RetrievalHead
    from fhopt.lm_head.options import HeadOptions as HeadOptions

_WHERE = {
    "apply_head": "fhopt.lm_head.install",
    "fit_head": "fhopt.lm_head.fitting",
    "head_report": "fhopt.lm_head.install",
    "unapply_head": "fhopt.lm_head.install",
    "Head": "fhopt.lm_head.head",
    "HeadOptions": "fhopt.lm_head.options",
    "RetrievalHead": "fhopt.lm_head.module",
}
__getattr__ = lazily(__name__, _WHERE)

__all__ = ["Head", "HeadOptions", "RetrievalHead", "apply_head", "fit_head", "head_report", "unapply_head"]
