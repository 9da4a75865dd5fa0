"""Programs that were compiled wrong once, in their smallest form, as the fuzzer of graphs printed them."""

from __future__ import annotations

from graph_programs import Call, Input, Program, Sizes

_QKV = (Input("q", "B H S D"), Input("k", "B H T D"), Input("v", "B H T D"))

FOUND: dict[str, Program] = {
    "weights filled with zero where a mask is true in later calls": Program(
        """
    def program(q, k, v, hidden):
        s = q @ k.mT
        p = s.softmax(-1).masked_fill(hidden, 0.0)
        return p @ v
    """,
        inputs=(*_QKV, Input("hidden", "B 1 1 T", values=("none", "few", "most"))),
    ),
    "keys indexed by an input that is in order in the first call": Program(
        """
    def program(q, k, v, keys):
        s = (q @ k.mT)[..., keys]
        return s.softmax(-1) @ v
    """,
        inputs=(*_QKV, Input("keys", "T", values=("in order", "shuffled", "drawn"), below="T")),
    ),
    "kv heads indexed by an input": Program(
        """
    def program(q, k, v, groups):
        k, v = k[:, groups], v[:, groups]
        return (q @ k.mT).softmax(-1) @ v
    """,
        inputs=(
            Input("q", "B H S D"),
            Input("k", "B G T D"),
            Input("v", "B G T D"),
            Input("groups", "H", values=("in order", "shuffled", "drawn"), below="G"),
        ),
        calls=(Call(Sizes(H=4, G=2)),) * 3,
    ),
    "scores clamped to a bound that the first call does not reach": Program(
        """
    def program(q, k, v):
        s = (q @ k.mT).clamp(-50.0, 50.0)
        return s.softmax(-1) @ v
    """,
        inputs=(Input("q", "B H S D", values=("normal", "large")), *_QKV[1:]),
    ),
    "weights detached": Program(
        """
    def program(q, k, v):
        p = (q @ k.mT).softmax(-1).detach()
        return p @ v
    """,
        inputs=_QKV,
    ),
}
