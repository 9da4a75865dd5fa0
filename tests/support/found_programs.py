"""Programs that were once miscompiled, in their smallest form, as printed by the graph fuzzer."""

from __future__ import annotations

from graph_programs import AttentionProgram, Call, CallSizes, Input

_QKV = (Input("q", "B H S D"), Input("k", "B H T D"), Input("v", "B H T D"))
_TWO_MASKS = (
    *_QKV,
    Input("hidden", "B H S T", values=("none", "few", "most")),
    Input("blocked", "B H S T", values=("none", "few", "most")),
)
_TWO_KEYS = (Call(sizes=CallSizes(B=2, H=4, G=4, S=5, T=2, D=4)),) * 3  # random masks often hide both

FOUND: dict[str, AttentionProgram] = {
    "weights filled with zero where a mask is true in later calls": AttentionProgram(
        """
    def program(q, k, v, hidden):
        s = q @ k.mT
        p = s.softmax(-1).masked_fill(hidden, 0.0)
        return p @ v
    """,
        inputs=(*_QKV, Input("hidden", "B 1 1 T", values=("none", "few", "most"))),
    ),
    "keys indexed by an input that is in order in the first call": AttentionProgram(
        """
    def program(q, k, v, keys):
        s = (q @ k.mT)[..., keys]
        return s.softmax(-1) @ v
    """,
        inputs=(*_QKV, Input("keys", "T", values=("in order", "shuffled", "drawn"), below="T")),
    ),
    "kv heads indexed by an input": AttentionProgram(
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
        calls=(Call(CallSizes(H=4, G=2)),) * 3,
    ),
    "scores clamped to a bound that the first call does not reach": AttentionProgram(
        """
    def program(q, k, v):
        s = (q @ k.mT).clamp(-50.0, 50.0)
        return s.softmax(-1) @ v
    """,
        inputs=(Input("q", "B H S D", values=("normal", "large")), *_QKV[1:]),
    ),
    "the lowest float64 as a mask value, and a softmax in float32": AttentionProgram(
        """
    def program(q, k, v, hidden):
        s = q @ k.mT
        s = s.masked_fill(hidden, torch.finfo(s.dtype).min)
        return F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype) @ v
    """,
        inputs=(*_QKV, Input("hidden", "H 1 1", values=("none", "few", "few"))),
        dtype="float64",
    ),
    "one mask for all scores": AttentionProgram(
        """
    def program(q, k, v, keep):
        s = (q @ k.mT).masked_fill(~keep, float("-inf"))
        return s.softmax(-1) @ v
    """,
        inputs=(*_QKV, Input("keep", "", values=("all", "most", "most"))),
        calls=(Call(mode="no_grad"),) * 6,
    ),
    "visible keys at -inf, others at the lowest number": AttentionProgram(
        """
    def program(q, k, v, additive):
        s = q @ k.mT
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), torch.finfo(s.dtype).min)
        return (s + additive).softmax(-1) @ v
    """,
        inputs=(*_QKV, Input("additive", "B 1 S T", values=("zeros", "0 or -inf", "0 or lowest"))),
        dtype="float64",
    ),
    "weights detached": AttentionProgram(
        """
    def program(q, k, v):
        p = (q @ k.mT).softmax(-1).detach()
        return p @ v
    """,
        inputs=_QKV,
    ),
    "weights times a learned gate of ones": AttentionProgram(
        """
    def program(q, k, v, gate):
        return ((q @ k.mT).softmax(-1) * gate) @ v
    """,
        inputs=(*_QKV, Input("gate", "H 1 1", values=("ones", "normal"), held="parameter")),
    ),
    "rows whose keys are all masked with -inf": AttentionProgram(
        """
    def program(q, k, v, keep):
        return (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v
    """,
        inputs=(*_QKV, Input("keep", "B 1 1 T", values=("all", "whole rows"))),
    ),
    "two finite levels of masks": AttentionProgram(
        """
    def program(q, k, v, padding):
        future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        s = (q @ k.mT).masked_fill(padding, -1e4).masked_fill(future, torch.finfo(q.dtype).min)
        return s.softmax(-1) @ v
    """,
        inputs=(*_QKV, Input("padding", "B 1 1 T", values=("none", "whole rows", "most"))),
    ),
    "scores overwritten by a finite value": AttentionProgram(
        """
    def program(q, k, v, own):
        s = (q @ k.mT).masked_fill(own, -5e4)
        return (s - s.logsumexp(-1, keepdim=True)).exp() @ v
    """,
        inputs=(*_QKV, Input("own", "B 1 S 1", values=("none", "most"))),
    ),
    "exponentials whose sum overflows": AttentionProgram(
        """
    def program(q, k, v):
        e = (q @ k.mT).exp()
        return e / e.sum(-1, keepdim=True) @ v
    """,
        inputs=(
            Input("q", "B H S D", values=("normal", "large")),
            Input("k", "B H T D", values=("normal", "large")),
            _QKV[2],
        ),
        calls=(Call(mode="no_grad"),) * 3,
    ),
    "scores that overflow in float16": AttentionProgram(
        """
    def program(q, k, v):
        return ((q * 40).half() @ (k * 40).half().mT).softmax(-1) @ v.half()
    """,
        inputs=(Input("q", "B H S D", values=("normal", "large")), *_QKV[1:]),
        calls=(Call(mode="no_grad"),) * 3,
    ),
    "scores that are the real part of a complex product": AttentionProgram(
        """
    def program(q, k, v):
        q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
        return (q @ k.mH).real.softmax(-1) @ v
    """,
        inputs=_QKV,
    ),
    "gradient by torch.func": AttentionProgram(
        """
    def program(q, k, v):
        return torch.func.grad(lambda x: ((x @ k.mT).softmax(-1) @ v).square().sum())(q)
    """,
        inputs=_QKV,
        calls=(Call(mode="no_grad"),) * 3,
    ),
    "dropout of the result in training": AttentionProgram(
        """
    def program(x, wq, wk, wv):
        q, k, v = ((x @ w).unflatten(-1, (4, 4)).transpose(1, 2) for w in (wq, wk, wv))
        o = F.dropout((q @ k.mT).softmax(-1) @ v, 0.3, True)
        return o.transpose(1, 2).flatten(2)
    """,
        inputs=(Input("x", "B S C"), *(Input(f"w{name}", "C C", held="parameter") for name in "qkv")),
        calls=(Call(mode="no_grad"),) * 3,
        aot=True,
    ),
    "exponentials times an input that their sum cancels, unless it is zero": AttentionProgram(
        """
    def program(q, k, v, factor):
        s = q @ k.mT
        e = (s - s.amax(-1, keepdim=True)).exp() * factor
        return e / e.sum(-1, keepdim=True) @ v
    """,
        inputs=(*_QKV, Input("factor", "", values=("ones", "normal", "zeros"))),
    ),
    "weights divided by their sum plus 1e-6, more than rounding in float64": AttentionProgram(
        """
    def program(q, k, v):
        p = (q @ k.mT * 0.5).softmax(-1)
        return p / (p.sum(-1, keepdim=True) + 1e-6) @ v
    """,
        inputs=_QKV,
        dtype="float64",
    ),
    "weights set to zero again, in rows where a bias is -inf": AttentionProgram(
        """
    def program(q, k, v, keep, bias):
        s = (q @ k.mT + bias).masked_fill(~keep, torch.finfo(q.dtype).min)
        return (s.softmax(-1) * keep) @ v
    """,
        inputs=(
            *_QKV,
            Input("keep", "B H S T", values=("all", "most", "random and whole rows")),
            Input("bias", "B H S T", values=("zeros", "normal", "0 or -inf")),
        ),
        calls=_TWO_KEYS,
    ),
    "weights masked by -inf set to zero again, in rows where a bias is -inf": AttentionProgram(
        """
    def program(q, k, v, hidden, bias):
        s = (q @ k.mT + bias).masked_fill(hidden, float("-inf"))
        return s.softmax(-1).masked_fill(hidden, 0.0) @ v
    """,
        inputs=(
            *_QKV,
            Input("hidden", "B H S T", values=("none", "few", "random and whole rows")),
            Input("bias", "B H S T", values=("zeros", "normal", "0 or -inf")),
        ),
        calls=_TWO_KEYS,
    ),
    "every key of a row masked, by a bias of -1e30 or an overwritten score of -1e9": AttentionProgram(
        """
    def program(q, k, v, hidden, blocked):
        s = (q @ k.mT * 0.5 + hidden * -1e30).masked_fill(blocked, -1e9)
        return s.softmax(-1) @ v
    """,
        inputs=_TWO_MASKS,
        calls=_TWO_KEYS,
    ),
    "every key of a row masked, by a bias of -1e9 or an overwritten score of -1e9": AttentionProgram(
        """
    def program(q, k, v, hidden, blocked):
        s = (q @ k.mT * 0.5 + hidden * -1e9).masked_fill(blocked, -1e9)
        return s.softmax(-1) @ v
    """,
        inputs=_TWO_MASKS,
        calls=_TWO_KEYS,
        dtype="float64",
    ),
    "weights of scores masked by -1e9 set to zero again, where the bias of all others is -1e30": AttentionProgram(
        """
    def program(q, k, v, hidden, blocked):
        s = (q @ k.mT * 0.5 + hidden * -1e30).masked_fill(blocked, -1e9)
        return s.softmax(-1).masked_fill(blocked, 0.0) @ v
    """,
        inputs=_TWO_MASKS,
        calls=_TWO_KEYS,
    ),
    "every score or none masked by a single boolean, with gradients": AttentionProgram(
        """
    def program(q, k, v, hidden, bias):
        s = torch.baddbmm(bias.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, q.shape[:2])
        return s.masked_fill(hidden, torch.finfo(s.dtype).min).softmax(-1) @ v
    """,
        inputs=(
            *_QKV,
            Input("hidden", "", values=("none", "all", "none")),
            Input("bias", "B H S T", held="buffer", grad=False),
        ),
        calls=(Call(sizes=CallSizes(B=2, H=4, G=4, S=5, T=5, D=4)),) * 3,
    ),
    "gradients of a row whose bias of -1e30 absorbs an overwritten score of -1e9": AttentionProgram(
        """
    def program(q, k, v, hidden):
        s = (q @ k.mT * 0.5).clone()
        s[..., 0] = -1e9
        return (s + hidden * -1e30).softmax(-1) @ v
    """,
        inputs=(*_QKV, Input("hidden", "B H S T", values=("none", "most", "all"))),
        calls=(Call(sizes=CallSizes(B=2, H=4, G=4, S=5, T=3, D=4)),) * 3,
    ),
    "two scores of the first query scaled through a view, under a mask of few keys": AttentionProgram(
        """
    def program(q, k, v, hidden):
        s = ((q @ k.repeat_interleave(2, 1).mT) * 0.5).contiguous()
        s.flatten(2)[..., :2].mul_(0.5)
        s = s.masked_fill(hidden, float("-inf"))
        return s.softmax(-1) @ v.repeat_interleave(2, 1)
    """,
        inputs=(
            Input("q", "B H S D"),
            Input("k", "B G T D"),
            Input("v", "B G T D"),
            Input("hidden", "B 1 1 T", values=("none", "few", "most")),
        ),
        calls=(Call(sizes=CallSizes(B=1, H=4, G=2)),) * 3,
        dtype="float64",
    ),
    "some scores clamped in place to a bound that the first call does not reach": AttentionProgram(
        """
    def program(q, k, v, hidden):
        s = q @ k.mT
        s[..., :2].clamp_(min=-50.0)
        return s.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    """,
        inputs=(
            Input("q", "B H S D", values=("normal", "large")),
            *_QKV[1:],
            Input("hidden", "B 1 1 T", values=("none", "few", "most")),
        ),
    ),
    "a bias that is an input and has the value that overwrites scores in later calls": AttentionProgram(
        """
    def program(q, k, v, additive, hidden):
        s = q @ k.mT + additive
        return s.masked_fill(hidden, -1e4).softmax(-1) @ v
    """,
        inputs=(
            *_QKV,
            Input("additive", "B 1 S T", values=("zeros", "0 or lowest", "0 or -1e4")),
            Input("hidden", "B H S T", values=("none", "few", "most")),
        ),
        calls=_TWO_KEYS,
        dtype="float64",
    ),
    "scores set to zero at an index of keys that are masked in the first call": AttentionProgram(
        """
    def program(q, k, v, zero, hidden):
        s = q @ k.mT
        s[..., zero[:2]] = 0.0
        s[..., hidden[:2]] = float("-inf")
        return s.softmax(-1) @ v
    """,
        inputs=(
            *_QKV,
            Input("zero", "T", values=("in order", "shuffled", "shuffled"), below="T"),
            Input("hidden", "T", values=("in order", "shuffled", "shuffled"), below="T"),
        ),
    ),
    "scores written in place, and then scaled without gradients": AttentionProgram(
        """
    def program(q, k, v, hidden):
        s = q @ k.mT
        s.masked_fill_(hidden, float("-inf"))
        with torch.no_grad():
            s = s * 1.5
        return s.softmax(-1) @ v
    """,
        inputs=(*_QKV, Input("hidden", "B H S T", values=("none", "few", "few"))),
        calls=(Call(CallSizes(T=6)),) * 3,
    ),
}
