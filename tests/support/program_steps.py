"""Parts of drawn attention programs, and the steps between them, as Python text.

`{name}` is an input of that kind (SIDES), drawn with its shape and values for each call, or a literal (LITERALS); a
number after the name distinguishes several of one kind. The first entry of every table is the plainest, so that a
failing program shrinks to the steps it needs.

Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size, C = H * D, K = G * D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from attention_spellings import JOINED, MIXED, PRODUCTS, WEIGHED

# --------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Side:
    """A kind of input. first: values of the first call, which mostly have no effect. later: those of further calls."""

    shapes: tuple[str, ...]
    first: tuple[str, ...]
    later: tuple[str, ...]
    below: str = ""
    changed: bool = False  # the program writes to it


PER_SCORE = ("B H S T", "S T", "B 1 1 T", "1 1 S T", "H 1 1", "B H S 1", "T", "S 1", "", "1 1 1 1", "B 1 S T")
FACTORS = ("normal", "positive", "zeros", "zero or one", "large", "negative")
SIDES = {
    "bias": Side(PER_SCORE, ("zeros", "zeros", "normal"), ("normal", "large", "zeros", "0 or -inf")),
    "factor": Side(PER_SCORE, ("ones", "ones", "normal"), FACTORS),
    "positive": Side(PER_SCORE, ("ones", "ones", "positive"), ("positive",)),
    "additive": Side(
        ("B 1 S T", "S T", "B 1 1 T", "B H S T", "T"), ("zeros", "0 or lowest", "0 or -1e4"),
        ("0 or lowest", "0 or -inf", "0 or -1e4", "0 or -1e9", "normal"),
    ),
    "keep": Side(PER_SCORE, ("all", "all", "most"), ("most", "random and whole rows", "whole rows", "all", "few")),
    "hidden": Side(PER_SCORE, ("none", "none", "few"), ("few", "random and whole rows", "whole rows", "none", "most")),
    "high": Side(("", "1 1 S T", "B 1 1 T", "H 1 1"), ("sixty", "sixty", "normal"), ("normal", "zeros", "sixty")),
    "low": Side(("", "1 1 S T", "B 1 1 T", "H 1 1"), ("minus sixty", "minus sixty", "normal"), ("normal", "zeros")),
    "one": Side(("", "1 1 S T", "B 1 1 T", "H 1 1"), ("ones", "ones", "positive"), ("positive", "small", "normal")),
    "keys": Side(("T",), ("in order", "in order", "shuffled"), ("shuffled", "drawn", "in order"), below="T"),
    "rows": Side(("S",), ("in order", "in order", "shuffled"), ("shuffled", "drawn", "in order"), below="S"),
    "heads": Side(("H",), ("in order", "in order", "shuffled"), ("shuffled", "drawn"), below="H"),
    "groups": Side(("H",), ("in order", "in order", "shuffled"), ("shuffled", "drawn"), below="G"),
    "mixer": Side(("H H",), ("identity", "identity", "normal"), ("normal", "identity")),
    "table": Side(("D T",), ("zeros", "normal"), ("normal", "zeros")),
    "per_channel": Side(("D", "", "1"), ("ones", "ones", "normal"), ("normal", "positive", "zeros")),
    "norm": Side(("D",), ("ones", "ones", "normal"), ("normal", "positive", "zeros")),
    "per_key": Side(("B 1 T 1", "T 1", "T D"), ("ones", "ones", "normal"), FACTORS),
    "hidden_key": Side(("B 1 T 1", "T 1"), ("none", "none", "few"), ("few", "most", "none")),
    "cosine": Side(("S D",), ("ones", "normal"), ("normal",)),
    "cache": Side(("B H T D",), ("zeros", "normal"), ("normal", "zeros"), changed=True),
    "sink": Side(("1 H 1 1",), ("zeros", "normal"), ("normal", "large", "0 or -inf")),
    "per_output": Side(("D", "B H S D", "B 1 S 1", ""), ("zeros", "normal"), ("normal", "large")),
    "gate": Side(("D", "B H S 1", "H 1 1", ""), ("ones", "ones", "normal"), FACTORS),
}  # fmt: skip

LITERALS = {
    "fill": ('float("-inf")', "torch.finfo(s.dtype).min", "-1e9", "-1e4", "-5e4", "-1000.0", "0.0", "-0.7 * 3e38"),
    "level": ("-1e4", "-1e3", "-5e4", "-1e9"),
    "limit": ("50.0", "5.0", "0.5", "1e4", "1000.0"),
    "cap": ("3.0", "50.0", "30.0"),
    "number": ("1.0", "0.5", "2.0", "-1.0", "1.001", "0.0"),
    "epsilon": ("1e-9", "1e-6", "1e-3", "1.0"),
    "scale": ("0.5", "1.0", "q.shape[-1] ** -0.5", "0.35"),
    "float_type": ("torch.float32", "torch.float64", "torch.bfloat16", "torch.float16"),
}  # fmt: skip

# --------------------------------------------------------------------------------------------------- parts

# q [B, H, S, D], k and v [B, H, T, D].
OPERAND_STEPS = {
    "query times number": "q = q * {scale}",
    "both times number": "q, k = q * 0.7, k * 0.7",
    "query times input": "q = q * {per_channel}",
    "query by head": "q = q * {gate}",
    "rms norm": "q, k = F.rms_norm(q, (q.shape[-1],), {norm}), F.rms_norm(k, (k.shape[-1],))",
    "l2 norm": "q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)",
    "rotate": "q = q * {cosine} + torch.cat([-q.chunk(2, -1)[1], q.chunk(2, -1)[0]], -1) * {cosine2}",
    "keys by index": "k, v = k[:, :, {keys}], v[:, :, {keys}]",
    "only keys by index": "k = k[:, :, {keys}]",
    "only values by index": "v = v[:, :, {keys}]",
    "queries by index": "q = q.index_select(2, {rows})",
    "heads by index": "q = q[:, {heads}]",
    "values times input": "v = v * {per_key}",
    "keys times input": "k = k * {per_key}",
    "values filled": "v = v.masked_fill({hidden_key}, 0.0)",
    "keys filled": "k = k.masked_fill({hidden_key}, 0.0)",
    "query detached": "q = q.detach()",
    "keys detached": "k = k.detach()",
    "values detached": "v = v.detach()",
    "cache written": "{cache}[:, :, 1:] = k[:, :, 1:]\nk = {cache}",
    "cache copied": "{cache}.copy_(v)\nv = {cache}",
    "keys written": "k = k.clone()\nk[:, :, 0] = {number}",
    "keys written through a view": "k = k.clone()\nview = k.transpose(1, 2)\nview[:, 0].mul_({number})",
    "cast": "q, k, v = q.to({float_type}), k.to({float_type}), v.to({float_type})",
    "values are keys": "v = k",
    "keys are queries": "k, v = q, q * 2.0",  # torch reads out of bounds if there are fewer values than keys
}

PRODUCTS_HERE = {
    "matmul": "q @ k.mT",
    **{name: text.replace("* by", "* {scale}").replace("1 / by", "1 / {scale}").replace("=by", "={scale}")
       .replace("mul(by)", "mul({scale})") for name, text in PRODUCTS.items()},
    "vecdot": "torch.linalg.vecdot(q.unsqueeze(3), k.unsqueeze(2))",
    "baddbmm on input": "torch.baddbmm(\n"
    "    {bias}.expand(*q.shape[:3], k.shape[2]).flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).mT\n"
    ").unflatten(0, q.shape[:2])",
    "complex": "pairs = [torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k)]\n"
    "(pairs[0] @ pairs[1].mH).real",
}  # fmt: skip

# s [B, H, S, T] -> the same shape.
SCORE_STEPS = {
    "times number": "s = s * {number}",
    "masked_fill": "s = s.masked_fill({hidden}, {fill})",
    "masked_fill, kept": "s = s.masked_fill(~{keep}, {fill})",
    "where": "s = torch.where({keep}, s, {fill})",
    "where an input": "s = torch.where({keep}, s, {bias})",
    "masked_fill in place": "s.masked_fill_({hidden}, {fill})",
    "masked_fill of a clone in place": "s = s.clone()\ns.masked_fill_({hidden}, {fill})",
    "written by index": "s = s.clone()\ns[..., 0] = {fill}",
    "written by an input index": "s = s.clone()\ns[..., {keys}[:2]] = {fill}",
    "written through a view": "s = s.contiguous()\nview = s.flatten(2)\nview[..., :2].mul_({number})",
    "written through a slice": "s = s * 1.0\ns[:, :, 1:].add_({number})",
    "two levels filled": "s = s.masked_fill({hidden}, {level}).masked_fill({hidden2}, torch.finfo(s.dtype).min)",
    "two levels added": "s = (s + {hidden} * {level}).masked_fill({hidden2}, torch.finfo(s.dtype).min)",
    "two levels summed": "s = s + ({hidden} * {level} + {hidden2} * -1e30)",
    "causal": "s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), {fill})",
    "causal with padding": "s = s.masked_fill(\n"
    "    torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), {fill}\n).masked_fill({hidden}, {level})",
    "add input": "s = s + {bias}",
    "subtract input": "s = s - {bias}",
    "add input in place": "s += {bias}",
    "additive mask": "s = s + {additive}",
    "one minus mask": "s = s + (1.0 - {keep}.to(s.dtype)) * {level}",
    "one minus input": "s = s + (1.0 - {factor}) * 7.0",
    "clamp": "s = s.clamp(-{limit}, {limit})",
    "clamp from below": "s = s.clamp(min=-{limit})",
    "clamp to inputs": "s = torch.clamp(s, {low}, {high})",
    "minimum": "s = torch.minimum(s, {high})",
    "maximum": "s = torch.maximum(s, {low})",
    "softcap": "s = {cap} * torch.tanh(s / {cap})",
    "times input": "s = s * {factor}",
    "times input in place": "s *= {factor}",
    "divided by input": "s = s / {positive}",
    "times log n": "s = s * torch.log(torch.arange(2, s.shape[-2] + 2, dtype=s.dtype)).unsqueeze(-1)",
    "gate of queries": "s = s * q.mean(-1, keepdim=True).sigmoid()",
    "gate of keys": "s = s * k.mean(-1).sigmoid().unsqueeze(-2)",
    "positions": "s = s + q @ {table}",
    "keys by index": "s = s[..., {keys}]",
    "keys gathered": "s = s.gather(-1, {keys}.expand(s.shape))",
    "rows by index": "s = s.index_select(2, {rows})",
    "heads by index": "s = s[:, {heads}]",
    "detach": "s = s.detach()",
    "no_grad": "with torch.no_grad():\n    s = s * 1.5",
    "cast": "s, v = s.to({float_type}), v.to({float_type})",
    "there and back": "s = s.to({float_type}).to(q.dtype)",
    "nan_to_num": "s = torch.nan_to_num(s)",
    "nan_to_num, infinite": "s = s.nan_to_num(nan=0.0, posinf=10.0, neginf=-10.0)",
    "alias": "s = s.view_as(s)",
    "heads mixed": 's = torch.einsum("bhst,hg->bgst", s, {mixer})',
    "dropout off": "s = F.dropout(s, 0.1, False)",
    "below a literal": "s = s.masked_fill(s < -60.0, {fill})",
    "below an input": "s = s.masked_fill(s < {low}, {fill})",
    "largest ones": "s = s.masked_fill(s < s.topk(min(4, s.shape[-1])).values[..., -1:], {fill})",
    "shifted by rows": "s = s - s.mean(-1, keepdim=True)",
    "shifted by columns": "s = s - s.amax(-2, keepdim=True)",
    "relu": "s = s.relu()",
    "flipped": "s = s.flip(-1)",
    "rolled": "s = s.roll({number}.__int__(), -1)",
}  # fmt: skip

SOFTMAXES = {
    **WEIGHED,
    "log_softmax": "s.log_softmax(-1).exp()",
    "function": "torch.nn.functional.softmax(s, -1)",
    "logsumexp": "(s - s.logsumexp(-1, keepdim=True)).exp()",
    "without shift": "e = s.exp()\ne / e.sum(-1, keepdim=True)",
    "shift by input": "e = (s - {high}).exp()\ne / e.sum(-1, keepdim=True)",
    "base two": "e = torch.exp2(s - s.amax(-1, keepdim=True))\ne / e.sum(-1, keepdim=True)",
    "normalize": "F.normalize((s - s.amax(-1, keepdim=True)).exp(), p=1.0, dim=-1)",
    "normalize without shift": "F.normalize(s.exp(), p=1.0, dim=-1)",
    "softmax one": "e = s.exp()\ne / (1 + e.sum(-1, keepdim=True))",
    "softmax one, shifted": "m = s.amax(-1, keepdim=True).clamp(min=0)\ne = (s - m).exp()\n"
    "e / (e.sum(-1, keepdim=True) + (-m).exp())",
    "exponentials times input": "e = (s - s.amax(-1, keepdim=True)).exp() * {factor}\ne / e.sum(-1, keepdim=True)",
    "exponentials filled": "e = (s - s.amax(-1, keepdim=True)).exp().masked_fill({hidden}, 0.0)\n"
    "e / e.sum(-1, keepdim=True)",
    "exponentials times input, unshifted": "e = s.exp() * {factor}\ne / e.sum(-1, keepdim=True)",
    "sum plus epsilon": "e = (s - s.amax(-1, keepdim=True)).exp()\ne / (e.sum(-1, keepdim=True) + {epsilon})",
    "sum plus epsilon, unshifted": "e = s.exp()\ne / (e.sum(-1, keepdim=True) + {epsilon})",
    "sum plus input": "e = (s - s.amax(-1, keepdim=True)).exp()\ne / (e.sum(-1, keepdim=True) + {bias})",
    "sum clamped": "e = s.exp()\ne / e.sum(-1, keepdim=True).clamp(min={epsilon})",
    "temperature": "(s / {positive}).softmax(-1)",
    "over queries": "s.softmax(-2)",
    "sinks": "torch.cat([s, {sink}.expand(s.shape[0], -1, s.shape[2], 1)], -1).softmax(-1)[..., :-1]",
    "sigmoid": "s.sigmoid()",
}  # fmt: skip

# p [B, H, S, T] -> the same shape.
WEIGHT_STEPS = {
    "times number": "p = p * {number}",
    "times input": "p = p * {factor}",
    "times keep": "p = p * {keep}",
    "times input in place": "p *= {factor}",
    "divided by input": "p = p / {positive}",
    "power": "p = p ** {positive}",
    "power of a literal": "p = p ** {number}",
    "filled with 0": "p = p.masked_fill({hidden}, 0.0)",
    "filled with 0, kept": "p = p.masked_fill(~{keep}, 0.0)",
    "filled with 0 in place": "p.masked_fill_({hidden}, 0.0)",
    "where": "p = torch.where({keep}, p, 0.0)",
    "rows without keys": "p = p.masked_fill(~{keep}.expand(p.shape).any(-1, keepdim=True), 0.0)",
    "nan_to_num": "p = torch.nan_to_num(p)",
    "relu": "p = p.relu()",
    "clamp": "p = p.clamp(0.0, 1.0)",
    "clamp from below": "p = p.clamp(min={epsilon})",
    "clamp from above": "p = p.clamp(max=0.999)",
    "minimum": "p = torch.minimum(p, {one})",
    "dropout of 0": "p = F.dropout(p, 0.0, True)",
    "dropout off": "p = F.dropout(p, 0.2, False)",
    "keys by index": "p = p[..., {keys}]",
    "keys gathered": "p = p.gather(-1, {keys}.expand(p.shape))",
    "rows by index": "p = p.index_select(2, {rows})",
    "heads by index": "p = p[:, {heads}]",
    "detach": "p = p.detach()",
    "no_grad": "with torch.no_grad():\n    p = p * 1.0",
    "alias": "p = p.view_as(p)",
    "alias written": "p = p.clone()\nview = p[:, :, :1]\nview.mul_({number})",
    "written by index": "p = p.clone()\np[..., 0] = 0.0",
    "normalized again": "p = p / p.sum(-1, keepdim=True)",
    "normalized again with epsilon": "p = p / (p.sum(-1, keepdim=True) + {epsilon})",
    "masked and normalized": "p = p * {factor}\np = p / p.sum(-1, keepdim=True)",
    "cast": "p = p.to({float_type}).to(v.dtype)",
    "heads mixed": 'p = torch.einsum("bhst,hg->bgst", p, {mixer})',
    "add input": "p = p + {bias}",
    "above epsilon": "p = p * (p > {epsilon})",
    "contiguous": "p = p.contiguous()",
    "reshaped": "p = p.flatten(0, 1).unflatten(0, s.shape[:2])",
    "transposed twice": "p = p.mT.contiguous().mT",
}  # fmt: skip

MIXES = {
    **MIXED,
    "normalized after": "p @ v / p.sum(-1, keepdim=True)",
    "of exponentials": "e = (s - s.amax(-1, keepdim=True)).exp()\n(e @ v) / e.sum(-1, keepdim=True)",
    "of exponentials without shift": "e = s.exp()\n(e @ v) / e.sum(-1, keepdim=True)",
}

# o [B, H, S, D].
OUTPUT_STEPS = {
    "add input": "o = o + {per_output}",
    "add input in place": "o += {per_output}",
    "times input": "o = o * {gate}",
    "dropout": "o = F.dropout(o, 0.3, True)",
    "dropout off": "o = F.dropout(o, 0.3, False)",
    "detach": "o = o.detach()",
    "written through a view": "view = o.transpose(1, 2)\nview.mul_({number})",
    "nan_to_num": "o = torch.nan_to_num(o)",
    "contiguous": "o = o.contiguous()",
    "add queries": "o = o + q",
    "plus its own noise": "o = o + torch.rand_like(o)",
}

RETURNED = {
    "output": "o",
    **{f"joined by {name}": text for name, text in JOINED.items()},
    "with weights": "o, p",
    "with scores": "o, s",
    "mean": "o.mean()",
    "views": "o, o.transpose(1, 2), o[:, :, 0]",
    "in memory order": "o.transpose(1, 2).contiguous().view(o.shape[0], -1)",
}

WRAPPED = {
    "vmap": "torch.vmap(attend)(torch.stack([{first}, 0.5 * {first}]))",
    "grad": "torch.func.grad(lambda y: attend(y).square().sum())({first})",
    "jvp": "torch.func.jvp(attend, ({first},), (2 * {first},))[1]",
    "vjp": "torch.func.vjp(attend, {first})[1](torch.ones_like({first}))[0]",
    "checkpoint": "checkpoint(attend, {first}, use_reentrant=False)",
    "no_grad": "torch.no_grad()(attend)({first})",
}

SDPA = {
    "plain": "F.scaled_dot_product_attention(q, k, v)",
    "causal": "F.scaled_dot_product_attention(q, k, v, is_causal=True, scale={scale})",
    "bool mask": "F.scaled_dot_product_attention(q, k, v, {keep})",
    "additive mask": "F.scaled_dot_product_attention(q, k, v, {additive}, scale={scale})",
    "exponentials beside it": "F.scaled_dot_product_attention(q, k, v, {additive}) + 0.0 * q.softmax(-1).sum()",
}
