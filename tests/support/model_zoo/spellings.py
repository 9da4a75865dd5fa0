"""Spellings of attention, a function each: contractions, scale, softmax, masks, heads, projections, rotations, caches.

    core    f(m, q, k, v) -> o     between the projections of a Block; all are [B, heads, T, D]
    heads   f(m, x) -> q, k, v     before a causal scaled_dot_product_attention; the same shapes
    whole   f(m, x) -> y           the Block gives no more than its weights

A function's name is the name of its entry. Its first line says what is spelled, and where such code is seen.
Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size, C = H * D channels, N = H // G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo import Case, Entry

B, H, G, T, D = 2, 4, 2, 12, 8
C, N, P = H * D, H // G, 7  # P: tokens in a cache
SCALE = D**-0.5
LEAST = torch.finfo(torch.float32).min
WINDOWS, WINDOW = 3, 4  # T = WINDOWS * WINDOW, also the rows and columns of an image

Run = Callable[..., Any]
Heads = tuple[Tensor, Tensor, Tensor]
Has = Mapping[str, Callable[[], Any]]
ENTRIES: list[Entry] = []


# --------------------------------------------------------------------------------------------------- the modules


def weight(*shape: int, fan: int = C) -> Callable[[], nn.Parameter]:
    """Maker of a parameter of deviation fan**-0.5: products with `fan` numbers of deviation 1 have deviation 1."""
    return lambda: nn.Parameter(torch.randn(shape) * fan**-0.5)


def settled(module: nn.Module) -> nn.Module:
    """`module` in evaluation, with linear maps that keep the deviation of their input and norms that do something."""
    for part in module.modules():
        matrix, bias = getattr(part, "weight", None), getattr(part, "bias", None)
        if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d)) and isinstance(matrix, nn.Parameter):
            nn.init.normal_(matrix, std=matrix[0].numel() ** -0.5)
        elif isinstance(part, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) and matrix is not None:
            nn.init.normal_(matrix, mean=1.0, std=0.2)
        if isinstance(bias, nn.Parameter):
            nn.init.normal_(bias, std=0.2)
    return module.eval()


class Functional(nn.Module):
    """`run(self, *inputs)` with the parameters, buffers and modules that the makers in `has` make."""

    def __init__(self, run: Run, has: Has) -> None:
        super().__init__()
        self.run = run
        self.hold(has)

    def hold(self, has: Has) -> None:
        for name, make in has.items():
            value = make()
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


class Block(Functional):
    """Projections q, k, v, o and a causal triangle [T, T]. What a spelling does not use does not enter its graph."""

    def __init__(self, run: Run, has: Has, kv_heads: int) -> None:
        super().__init__(run, {})
        self.q, self.o = nn.Linear(C, C), nn.Linear(C, C)
        self.k, self.v = nn.Linear(C, kv_heads * D), nn.Linear(C, kv_heads * D)
        self.register_buffer("triangle", torch.ones(T, T, dtype=torch.bool).tril())
        self.hold(has)  # may put other modules in the place of these

    def split(self, x: Tensor) -> Heads:
        """x [B, T, C] -> q [B, H, T, D], k and v [B, G, T, D]."""
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, D).transpose(1, 2) for p in (self.q, self.k, self.v))
        return q, k, v

    def join(self, o: Tensor) -> Tensor:
        """o [B, H, T, D] -> [B, T, C], projected."""
        return self.o(o.transpose(1, 2).reshape(o.shape[0], -1, C))


def tokens() -> tuple[Any, ...]:
    return (torch.randn(B, T, C),)


def _entry(around: Callable[[Run], Run], options: Mapping[str, Any]) -> Callable[[Run], Run]:
    """Decorator that adds an entry. options: `has`, `inputs` (maker of the arguments), and fields of Entry."""
    traits = dict(options)
    has, inputs = traits.pop("has", {}), traits.pop("inputs", tokens)
    traits = dict(heads=H, kv_heads=H, head_dim=D, sites=1) | traits
    rows = traits["kv_heads"] * H // traits["heads"] or G  # kv heads of the Block, whose width is always H query heads
    if traits["sites"] == 0:
        traits = dict(explained=1) | traits | dict(heads=0, kv_heads=0, head_dim=0)

    def add(function: Run) -> Run:
        def build() -> Case:
            torch.manual_seed(1)
            return Case(settled(Block(around(function), has, rows)), inputs())

        ENTRIES.append(Entry(function.__name__, "spelling", build, **traits))
        return function

    return add


def core(**options: Any) -> Callable[[Run], Run]:
    return _entry(lambda f: lambda m, x, *more: m.join(f(m, *m.split(x), *more)), options)


def heads(**options: Any) -> Callable[[Run], Run]:
    return _entry(lambda f: lambda m, x, *more: m.join(attend(*f(m, x, *more), is_causal=True)), options)


def whole(**options: Any) -> Callable[[Run], Run]:
    return _entry(lambda f: f, options)


# --------------------------------------------------------------------------------------------------- plain parts


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)) * SCALE  # [B, H, S, T]


def split(t: Tensor) -> Tensor:
    return t.view(*t.shape[:2], -1, D).transpose(1, 2)  # [B, heads, T, D]


def fold(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-2], D)  # [B*H, T, D]


def alibi() -> Tensor:
    return -(2.0 ** -torch.arange(1, H + 1)).view(1, H, 1, 1) * torch.arange(T - 1, -1, -1)  # [1, H, 1, T]


def folded_alibi() -> Tensor:
    return alibi().expand(B, H, 1, T).reshape(B * H, 1, T)


def table_index() -> Tensor:
    return torch.arange(T)[:, None] - torch.arange(T) + T - 1  # [T, T], 0 .. 2T-2


def packs() -> Tensor:
    return torch.tensor([0] * 5 + [1] * 3 + [2] * 4)  # [T]: which of three sequences a token belongs to


def with_padding() -> tuple[Any, ...]:
    return (*tokens(), torch.arange(T) < torch.tensor([[T], [T - 4]]))


def angles(size: int = D) -> Tensor:
    return torch.arange(T)[:, None] * 100.0 ** (-torch.arange(0, size, 2) / size)  # [T, size / 2]


# --------------------------------------------------------------------------------------------------- q times k


@core()
def matmul_function(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch.matmul twice, the scores divided by sqrt(D): BERT, the annotated Transformer."""
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(D), dim=-1), v)


@core()
def at_operator(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The operator @ and .mT."""
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


@core()
def matmul_method(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Methods all the way."""
    return q.matmul(k.permute(0, 1, 3, 2)).mul(SCALE).softmax(dim=-1).matmul(v)


@core()
def bmm_on_folded_heads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """bmm on [B*H, T, D]: BART before sdpa, CLIP, diffusers."""
    weights = torch.bmm(fold(q) * SCALE, fold(k).transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, fold(v)).view(B, H, T, D)


@core(has=dict(alibi=folded_alibi))
def baddbmm_positional(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """baddbmm whose addend is half of ALiBi."""
    weights = torch.baddbmm(m.alibi, fold(q), fold(k).transpose(1, 2), beta=0.5, alpha=SCALE).softmax(-1)
    return torch.bmm(weights, fold(v)).view(B, H, T, D)


@core(has=dict(alibi=folded_alibi))
def baddbmm_with_keywords(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A method call without a positional argument: Bloom."""
    scored = m.alibi.baddbmm(batch1=fold(q), batch2=fold(k).transpose(1, 2), beta=1.0, alpha=SCALE)
    weights = F.softmax(scored.view(B, H, T, T).masked_fill(~m.triangle, LEAST), dim=-1, dtype=torch.float32)
    return torch.bmm(weights.view(B * H, T, T), fold(v)).view(B, H, T, D)


@core()
def baddbmm_on_nothing(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """beta = 0 on memory that nobody wrote, for the sake of alpha: Megatron, diffusers without a mask."""
    nothing = torch.empty(B * H, T, T, dtype=q.dtype, device=q.device)
    weights = torch.baddbmm(nothing, fold(q), fold(k).transpose(-1, -2), beta=0, alpha=SCALE).softmax(-1)
    return torch.bmm(weights, fold(v)).view(B, H, T, D)


@core()
def einsum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """einsum for both contractions."""
    weights = (torch.einsum("bhid,bhjd->bhij", q, k) * SCALE).softmax(dim=-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


@core()
def einsum_with_spaces(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Spaces in the equation: x-transformers and what was written after it."""
    weights = (torch.einsum("b h i d, b h j d -> b h i j", q, k) * SCALE).softmax(dim=-1)
    return torch.einsum("b h i j, b h j d -> b h i d", weights, v)


@whole()
def einsum_without_transpose(m: Any, x: Tensor) -> Tensor:
    """Heads stay behind tokens: Flax habits, the plain path of flash-attention's tests."""
    q, k, v = (p(x).view(B, T, H, D) for p in (m.q, m.k, m.v))
    weights = torch.softmax(torch.einsum("bshd,bthd->bhst", q, k) * SCALE, dim=-1)
    return m.o(torch.einsum("bhst,bthd->bshd", weights, v).reshape(B, T, C))


@core()
def einsum_with_ellipsis(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch axes without names."""
    weights = (torch.einsum("...id,...jd->...ij", q, k) * SCALE).softmax(-1)
    return torch.einsum("...ij,...jd->...id", weights, v)


@core()
def einsum_with_sublists(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """einsum with lists of numbers instead of an equation."""
    weights = (torch.einsum(q, [0, 1, 2, 4], k, [0, 1, 3, 4], [0, 1, 2, 3]) * SCALE).softmax(-1)
    return torch.einsum(weights, [0, 1, 2, 3], v, [0, 1, 3, 4], [0, 1, 2, 4])


@core(kv_heads=G)
def einsum_grouped(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The queries of a group on an axis of their own; keys are never repeated: T5X, Gemma in JAX style."""
    weights = (torch.einsum("bgnsd,bgtd->bgnst", q.view(B, G, N, T, D), k) * SCALE).softmax(-1)
    return torch.einsum("bgnst,bgtd->bgnsd", weights, v).reshape(B, H, T, D)


@core()
def multiply_and_sum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Both contractions as a broadcast product and a sum: code that teaches."""
    weights = ((q[..., None, :] * k[..., None, :, :]).sum(-1) * SCALE).softmax(-1)
    return (weights[..., None] * v[..., None, :, :]).sum(-2)


@whole(heads=1, kv_heads=1, head_dim=C, inputs=lambda: (torch.randn(T, C),))
def inner_and_tensordot(m: Any, x: Tensor) -> Tensor:
    """One sequence, one head, no batch: torch.inner, then torch.tensordot."""
    q, k, v = m.q(x), m.k(x), m.v(x)
    return m.o(torch.tensordot((torch.inner(q, k) * C**-0.5).softmax(-1), v, dims=1))


@whole(heads=1, kv_heads=1, head_dim=C, inputs=lambda: (torch.randn(T, C),))
def linear_on_activations(m: Any, x: Tensor) -> Tensor:
    """F.linear whose weight is the keys, then mm; one sequence, one head, no batch."""
    weights = (F.linear(m.q(x), m.k(x)) / C**0.5).softmax(dim=1)
    return m.o(torch.mm(weights, m.v(x)))


@whole()
def keys_permuted_at_once(m: Any, x: Tensor) -> Tensor:
    """k.permute(0, 2, 3, 1) splits heads and transposes in one step: GPT-1, minGPT's ancestors."""
    q, v = (p(x).view(B, T, H, D).permute(0, 2, 1, 3) for p in (m.q, m.v))
    k = m.k(x).view(B, T, H, D).permute(0, 2, 3, 1)  # [B, H, D, T]
    return m.join(F.softmax(torch.matmul(q, k) / math.sqrt(D), dim=-1) @ v)


@core()
def key_major(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores [B, H, T, S], softmax over the rows, values on the left."""
    weights = ((k @ q.transpose(-2, -1)) * SCALE).softmax(dim=-2)
    return (v.transpose(-2, -1) @ weights).transpose(-2, -1)


@whole()
def key_major_einsum(m: Any, x: Tensor) -> Tensor:
    """Scores [B, H, T, S] and a softmax over axis 2 out of an einsum."""
    q, k, v = (p(x).view(B, T, H, D) for p in (m.q, m.k, m.v))
    weights = (torch.einsum("bjhd,bihd->bhji", k, q) * SCALE).softmax(dim=2)
    return m.o(torch.einsum("bhji,bjhd->bihd", weights, v).reshape(B, T, C))


@core(has=dict(table=weight(2 * T - 1, D, fan=1), index=table_index))
def relative_key_embeddings(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries also meet an embedding of the distance: Shaw et al. 2018, BERT's relative_key."""
    distances = m.table[m.index]  # [S, T, D]
    return ((q @ k.mT + torch.einsum("bhid,ijd->bhij", q, distances)) / math.sqrt(D)).softmax(-1) @ v


# --------------------------------------------------------------------------------------------------- weights times v


@whole()
def einsum_into_tokens_first(m: Any, x: Tensor) -> Tensor:
    """The second contraction already puts heads behind tokens."""
    q, k, v = m.split(x)
    return m.o(torch.einsum("bhst,bhtd->bshd", scores(q, k).softmax(-1), v).flatten(2))


@core()
def values_on_the_left(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """v^T times the transposed weights."""
    return torch.matmul(v.transpose(2, 3), scores(q, k).softmax(-1).transpose(2, 3)).transpose(2, 3)


@whole(has=dict(w_o=weight(H, D, C)))
def einsum_with_output_projection(m: Any, x: Tensor) -> Tensor:
    """Weights, values and W_o in one einsum of three operands."""
    q, k, v = m.split(x)
    return torch.einsum("bhqs,bhsd,hde->bqe", scores(q, k).softmax(-1), v, m.w_o)


@core()
def weights_zeroed_again(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights in which some entries are set to zero again after the softmax: DeBERTa's XSoftmax."""
    weights = scores(q, k).masked_fill(~m.triangle, LEAST).softmax(-1)
    return weights.masked_fill(~m.triangle, 0.0) @ v


# --------------------------------------------------------------------------------------------------- scale


@core()
def scale_on_queries(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries are scaled before the product: OPT, Whisper, fairseq."""
    return ((q * SCALE) @ k.mT).softmax(-1) @ v


@core()
def scale_on_keys(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys are divided after their transpose."""
    return (q @ (k.transpose(-1, -2) / D**0.5)).softmax(-1) @ v


@core()
def scale_on_both(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """D**-0.25 on each side, which half precision likes: Whisper by OpenAI, GLIDE."""
    return torch.softmax((q * D**-0.25) @ (k * D**-0.25).mT, -1) @ v


@core()
def scale_in_place(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """mul_ on the scores, its result used."""
    return (q @ k.mT).mul_(SCALE).softmax(-1) @ v


@core()
def scale_by_augmented_division(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`scores /= sqrt(D)`: Falcon."""
    scored = q @ k.mT
    scored /= math.sqrt(D)
    return scored.softmax(-1) @ v


@core()
def scale_by_tensor(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The root of a tensor that is made in the graph: GPT-J, course notes."""
    return ((q @ k.mT) / torch.sqrt(torch.tensor(k.shape[-1], dtype=torch.float32))).softmax(-1) @ v


@core(has=dict(scale=lambda: torch.tensor([float(D)]).sqrt()))
def scale_by_buffer(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A buffer of one number: GPT-J's scale_attn, many tutorials."""
    return (torch.matmul(q, k.mT) / m.scale).softmax(-1) @ v


@whole(has=dict(w_q=weight(C, C, fan=C * D)))
def scale_in_weight(m: Any, x: Tensor) -> Tensor:
    """No scale at all: it is folded into W_q, or into the initialisation as in T5."""
    _, k, v = m.split(x)
    return m.join((split(F.linear(x, m.w_q)) @ k.mT).softmax(-1) @ v)


@core(has=dict(temperature=lambda: nn.Parameter(torch.full((H, 1, 1), 3.0) + torch.arange(H).view(H, 1, 1))))
def learned_temperature(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cosine attention with a learned factor per head."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return ((q @ k.transpose(-2, -1)) * m.temperature).softmax(-1) @ v


@core(has=dict(logit_scale=lambda: nn.Parameter(torch.full((H, 1, 1), math.log(4.0)))))
def learned_temperature_in_logarithms(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cosine attention with a clamped exponential of a learned number per head: Swin v2."""
    cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return (cosine * torch.clamp(m.logit_scale, max=math.log(100.0)).exp()).softmax(-1) @ v


@core(has=dict(logarithms=lambda: (torch.arange(T) + 2.0).log()))
def scale_by_position(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries grow with the logarithm of their position: Qwen's log-n scaling, Llama 4."""
    return attend(q * m.logarithms[:, None], k, v, is_causal=True)


# --------------------------------------------------------------------------------------------------- softmax


@core()
def softmax_over_axis_3(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The axis counted from the front."""
    return F.softmax(scores(q, k), dim=3) @ v


@core()
def softmax_in_float32(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """dtype=float32, then type_as: Llama's habit."""
    return torch.softmax(scores(q, k), dim=-1, dtype=torch.float32).type_as(q) @ v


@core()
def softmax_after_float(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """.float() before and .to() after: llama's reference code."""
    return F.softmax(scores(q, k).float(), dim=-1).to(v.dtype) @ v


@core(has=dict(softmax=lambda: nn.Softmax(dim=-1)))
def softmax_module(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """nn.Softmax: Swin, Segformer, SAGAN."""
    return m.softmax(scores(q, k)) @ v


@core()
def softmax_out_of_log_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """log_softmax().exp()."""
    return F.log_softmax(scores(q, k), dim=-1).exp() @ v


@core()
def softmax_by_hand(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(s - max) over its sum."""
    s = scores(q, k)
    e = torch.exp(s - s.max(dim=-1, keepdim=True).values)
    return (e / e.sum(dim=-1, keepdim=True)) @ v


@core()
def softmax_by_hand_without_maximum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(s) over its sum: lessons, and code that trusts its scores."""
    e = scores(q, k).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@core()
def softmax_of_base_2(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp2 with log2(e) in the scale, as kernels do it."""
    s = (q @ k.mT) * (SCALE * math.log2(math.e))
    e = torch.exp2(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


@core()
def softmax_by_logsumexp(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(s - logsumexp(s)), as in the backward pass of flash attention."""
    s = scores(q, k)
    return (s - s.logsumexp(dim=-1, keepdim=True)).exp() @ v


@core()
def softmax_of_centred_scores(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The maximum is taken off before a softmax that would do so itself: GPT-NeoX's past, CogView."""
    s = scores(q, k)
    return (s - s.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1) @ v


@core()
def softmax_divided_at_the_end(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Division after the second contraction: the online softmax of flash attention, in one block."""
    s = scores(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


@core()
def softmax_plus_one(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(s) / (1 + sum): a sink of logit zero, "softmax off by one"."""
    e = scores(q, k).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


@core()
def softmax_plus_one_stable(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with a maximum that is at least zero."""
    s = scores(q, k)
    top = s.amax(-1, keepdim=True).clamp(min=0)
    e = (s - top).exp()
    return (e / ((-top).exp() + e.sum(-1, keepdim=True))) @ v


@core()
def softmax_with_padded_column(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The zero sink as a padded column that is cut off again."""
    return F.pad(scores(q, k), (1, 0)).softmax(-1)[..., 1:] @ v


@core(has=dict(sinks=weight(H, fan=1)))
def learned_sinks(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A learned logit per head is joined, and its column cut off after the softmax: gpt-oss."""
    s = scores(q, k).masked_fill(~m.triangle, LEAST)
    joined = torch.cat([s, m.sinks.reshape(1, -1, 1, 1).expand(B, -1, T, -1)], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    return F.softmax(joined, dim=-1, dtype=joined.dtype)[..., :-1] @ v


@core()
def softmax_without_nan(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """nan_to_num for rows that see nothing."""
    return torch.nan_to_num(scores(q, k).masked_fill(~m.triangle, -math.inf).softmax(-1)) @ v


# --------------------------------------------------------------------------------------------------- masks


def float_triangle() -> Tensor:
    return torch.zeros(T, T).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), LEAST)


@core(has=dict(mask=float_triangle))
def mask_added(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A float mask is added: most of transformers' eager code."""
    return (scores(q, k) + m.mask).softmax(-1) @ v


@core(has=dict(mask=float_triangle))
def mask_as_first_addend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mask is the first operand of the addition."""
    return (m.mask[None, None] + scores(q, k)).softmax(-1) @ v


@core(has=dict(mask=float_triangle))
def mask_added_in_place(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`scores += mask`: T5."""
    s = scores(q, k)
    s += m.mask
    return s.softmax(-1) @ v


@core(has=dict(mask=float_triangle))
def mask_added_and_clamped(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A maximum with the least number keeps sums of masks finite: OPT, XGLM."""
    least = torch.tensor(torch.finfo(q.dtype).min)
    return torch.max(scores(q, k) + m.mask, least).softmax(-1) @ v


@core()
def masked_fill_with_infinity(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """masked_fill(~allowed, -inf): nanoGPT."""
    return scores(q, k).masked_fill(m.triangle == 0, float("-inf")).softmax(-1) @ v


@core()
def masked_fill_with_least(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """masked_fill with the least finite number: DistilBERT, x-transformers."""
    return scores(q, k).masked_fill(~m.triangle, -torch.finfo(q.dtype).max).softmax(-1) @ v


@core()
def where_allowed(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """where(allowed, scores, -1e30): JAX habits."""
    return torch.where(m.triangle, scores(q, k), -1e30).softmax(-1) @ v


@core()
def where_forbidden(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """where(forbidden, -inf, scores)."""
    return torch.where(~m.triangle, float("-inf"), scores(q, k)).softmax(-1) @ v


@core()
def where_with_tensor(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fill value is a tensor without axes: GPT-2 in transformers."""
    value = torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype)
    return torch.where(m.triangle, scores(q, k).to(q.dtype), value).softmax(-1) @ v


@core()
def masked_in_place(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """masked_fill_ whose result nobody takes."""
    s = scores(q, k)
    s.masked_fill_(~m.triangle, float("-inf"))
    return s.softmax(-1) @ v


@core()
def masked_by_assignment(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Assignment at the places of a bool mask."""
    s = scores(q, k)
    s[:, :, ~m.triangle] = float("-inf")
    return s.softmax(-1) @ v


@core(has=dict(ones=lambda: torch.ones(1, 1, T, T).tril()))
def mask_multiplied_and_subtracted(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """s * m - 1e10 * (1 - m) with m of zeros and ones: GPT-2's first release."""
    return (scores(q, k) * m.ones - 1e10 * (1 - m.ones)).softmax(-1) @ v


@core(sites=0)
def masked_exponentials(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The exponentials are multiplied by the mask before they are summed."""
    e = scores(q, k).exp() * m.triangle
    return (e / e.sum(-1, keepdim=True)) @ v


@core(has=dict(bias=lambda: torch.tril(torch.ones(2 * T, 2 * T)).view(1, 1, 2 * T, 2 * T)))
def triangle_buffer_sliced(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A buffer for the longest text, sliced to this one: minGPT, GPT-2."""
    return scores(q, k).masked_fill(m.bias[:, :, :T, :T] == 0, float("-inf")).softmax(-1) @ v


@core()
def causal_from_positions(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Positions are compared in the graph."""
    position = torch.arange(T, device=q.device)
    return scores(q, k).masked_fill(position[None, :] > position[:, None], -1e9).softmax(-1) @ v


@core()
def causal_from_triu(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch.full(-inf).triu(1), added: llama's reference code."""
    return (scores(q, k) + torch.full((T, T), float("-inf")).triu(diagonal=1)).softmax(-1) @ v


@core()
def sliding_window(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A causal band of four keys, made in the graph: Mistral, Gemma."""
    distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
    return attend(q, k, v, attn_mask=(distance >= 0) & (distance < 4))


@core(inputs=with_padding)
def key_padding(m: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """keep [B, T] says which keys are words: [B, 1, 1, T] on the scores."""
    return scores(q, k).masked_fill(~keep[:, None, None, :], float("-inf")).softmax(-1) @ v


@core(inputs=with_padding)
def key_padding_as_extended_mask(m: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """(1 - keep) * least, added: BERT's extended attention mask."""
    extended = (1.0 - keep.unsqueeze(1).unsqueeze(2).to(q.dtype)) * LEAST
    return (scores(q, k) + extended).softmax(-1) @ v


@core(inputs=with_padding)
def padding_and_causal(m: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Two masks one after the other."""
    s = scores(q, k).masked_fill(~m.triangle, -1e9)
    return s.masked_fill(~keep[:, None, None, :], -1e9).softmax(-1) @ v


@core(has=dict(packs=packs))
def packed_sequences(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Several texts in a row of tokens: a block-diagonal mask out of their numbers."""
    same = m.packs[:, None] == m.packs[None, :]
    return attend(q, k, v, attn_mask=same & m.triangle)


@core()
def alibi_in_the_graph(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slopes and distances are computed with the scores: MPT, Bloom."""
    slopes = torch.pow(2.0, -torch.arange(1, H + 1, dtype=torch.float32) * 8.0 / H)
    distance = torch.arange(T)[None, :] - torch.arange(T)[:, None]
    s = scores(q, k) + slopes.view(1, H, 1, 1) * distance
    return s.masked_fill(~m.triangle, LEAST).softmax(-1) @ v


@core(has=dict(table=weight(2 * T - 1, H, fan=1), index=table_index))
def relative_bias_table(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A learned bias per head and distance, gathered by an index: Swin, BEiT."""
    bias = m.table[m.index.view(-1)].view(T, T, -1).permute(2, 0, 1).contiguous()
    return (scores(q, k) + bias.unsqueeze(0)).softmax(-1) @ v


@core(has=dict(table=weight(2 * T - 1, H, fan=1)))
def relative_bias_embedding(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as an embedding of distances that the graph computes: T5."""
    distance = torch.arange(T)[None, :] - torch.arange(T)[:, None]
    bias = F.embedding(distance + T - 1, m.table).permute([2, 0, 1]).unsqueeze(0)
    return attend(q, k, v, attn_mask=bias)


def window_mask() -> Tensor:
    near = torch.zeros(WINDOWS, WINDOW, WINDOW)
    near[-1, :2, 2:] = near[-1, 2:, :2] = -100.0
    return near  # [windows, N, N]: the last window holds two neighbourhoods


@core(has=dict(mask=window_mask), inputs=lambda: (torch.randn(B * WINDOWS, WINDOW, C),))
def mask_added_after_view(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Windows leave the batch for the addition and return: Swin."""
    s = scores(q, k).view(B, WINDOWS, H, WINDOW, WINDOW) + m.mask.unsqueeze(1).unsqueeze(0)
    return s.view(-1, H, WINDOW, WINDOW).softmax(-1) @ v


@core()
def softcap(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """tanh(s / cap) * cap: Gemma 2, Grok."""
    s = torch.tanh(scores(q, k) / 2.0) * 2.0
    return s.masked_fill(~m.triangle, LEAST).softmax(-1) @ v


@core(has=dict(drop=lambda: nn.Dropout(0.1)))
def dropout_module(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """nn.Dropout on the weights, in evaluation."""
    return m.drop(F.softmax(scores(q, k), dim=-1)) @ v


@core(has=dict(heights=weight(H, fan=1)))
def learned_distance_decay(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A learned slope per head and the logarithm of the distance: KERPLE."""
    distance = (torch.arange(T)[:, None] - torch.arange(T)[None, :]).clamp(min=0)
    bias = -m.heights.abs().view(H, 1, 1) * torch.log1p(distance)
    return (scores(q, k) + bias).masked_fill(~m.triangle, -1e9).softmax(-1) @ v


@whole(has=dict(gate=lambda: nn.Linear(C, H)))
def forget_gate(m: Any, x: Tensor) -> Tensor:
    """A bias out of cumulated gates of the tokens between query and key: the Forgetting Transformer."""
    q, k, v = m.split(x)
    past = F.logsigmoid(m.gate(x)).cumsum(1).transpose(1, 2)  # [B, H, T]
    bias = (past[..., :, None] - past[..., None, :]).masked_fill(~m.triangle, float("-inf"))
    return m.join(attend(q, k, v, attn_mask=bias))


# --------------------------------------------------------------------------------------------------- sdpa


@core(has=dict(mask=float_triangle))
def sdpa_positional(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every argument by position but the scale."""
    return F.scaled_dot_product_attention(q, k, v, m.mask, 0.0, False, scale=0.3)


@core()
def sdpa_keywords(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every argument by name."""
    return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m.triangle, dropout_p=0.0)


@core()
def sdpa_causal(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """is_causal=True."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@core(has=dict(mask=alibi))
def sdpa_with_float_mask(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A float mask that broadcasts over queries."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.mask)


@core(kv_heads=G)
def sdpa_grouped(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """enable_gqa=True."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@whole(heads=1, kv_heads=1, head_dim=C)
def sdpa_of_rank_3(m: Any, x: Tensor) -> Tensor:
    """One head, [B, T, D] without an axis for it."""
    return m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)))


@core()
def sdpa_on_folded_heads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B*H, T, D]: BART's habits on a new function."""
    return F.scaled_dot_product_attention(fold(q), fold(k), fold(v)).view(B, H, T, D)


@core(kv_heads=G)
def sdpa_of_rank_5(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys that broadcast over the queries of their group."""
    o = F.scaled_dot_product_attention(q.view(B, G, N, T, D), k.unsqueeze(2), v.unsqueeze(2))
    return o.reshape(B, H, T, D)


@whole()
def sdpa_between_transposes(m: Any, x: Tensor) -> Tensor:
    """Heads behind tokens; the transposes stand in the call."""
    q, k, v = (p(x).view(B, T, H, D) for p in (m.q, m.k, m.v))
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return m.o(o.contiguous().view(B, T, C))


@core()
def sdpa_of_chosen_backend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Inside the context that chooses a kernel."""
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


# --------------------------------------------------------------------------------------------------- kv heads


@core(kv_heads=G)
def repeat_interleave(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """repeat_interleave on axis 1: gpt-fast, Cohere."""
    return attend(q, k.repeat_interleave(N, dim=1), v.repeat_interleave(N, dim=1))


@core(kv_heads=G)
def expand_and_reshape(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """expand + reshape: repeat_kv of Llama."""
    k, v = (t[:, :, None].expand(B, G, N, T, D).reshape(B, H, T, D) for t in (k, v))
    return scores(q, k).softmax(-1) @ v


@core(kv_heads=G)
def repeat_on_new_axis(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """unsqueeze, repeat, view."""
    k, v = (t.unsqueeze(2).repeat(1, 1, N, 1, 1).view(B, H, T, D) for t in (k, v))
    return scores(q, k).softmax(-1) @ v


@core(kv_heads=0)
def tiled_heads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """repeat on axis 1: query head h reads kv head h % G, not h // N."""
    return scores(q, k.repeat(1, N, 1, 1)).softmax(-1) @ v.repeat(1, N, 1, 1)


@core(kv_heads=G, has=dict(owner=lambda: torch.arange(H) // N))
def heads_by_index_select(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """index_select with a buffer that names each query's head: Bark, tensor-parallel code."""
    return attend(q, k.index_select(1, m.owner), v.index_select(1, m.owner))


@core(kv_heads=G)
def heads_by_indexing(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Indexing with numbers made in the graph."""
    owner = torch.arange(H) // N
    return scores(q, k[:, owner]).softmax(-1) @ v[:, owner]


@core(kv_heads=G)
def heads_by_gather(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """gather on the head axis."""
    owner = (torch.arange(H) // N).view(1, H, 1, 1).expand(B, H, T, D)
    return attend(q, k.gather(1, owner), v.gather(1, owner))


@core(kv_heads=G)
def stacked_heads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """stack of the same tensor, then flatten."""
    k, v = (torch.stack([t] * N, dim=2).flatten(1, 2) for t in (k, v))
    return attend(q, k, v)


@core(kv_heads=G)
def heads_repeated_as_by_einops(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `repeat(k, "b g t d -> b (g n) t d")` leaves: reshape, expand, reshape."""
    k, v = (t.reshape(B, G, 1, T, D).expand(-1, -1, N, -1, -1).reshape(B, G * N, T, D) for t in (k, v))
    return torch.einsum("b h i j, b h j d -> b h i d", scores(q, k).softmax(-1), v)


@core(kv_heads=G)
def broadcast_over_groups(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, G, N, S, D] @ [B, G, 1, D, T]: keys broadcast in the product."""
    s = (q.view(B, G, N, T, D) @ k.unsqueeze(2).transpose(-1, -2)) * SCALE
    return (s.masked_fill(~m.triangle, -math.inf).softmax(-1) @ v.unsqueeze(2)).flatten(1, 2)


@core(kv_heads=G)
def groups_as_queries(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The query heads of a group are more queries of its kv head: [B, G, N*S, D]."""
    s = (q.reshape(B, G, N * T, D) @ k.mT) * SCALE
    return (s.softmax(-1) @ v).view(B, H, T, D)


@core(kv_heads=1)
def multi_query(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One kv head that broadcasts: Falcon-7B, PaLM."""
    return scores(q, k).softmax(-1) @ v


@whole(kv_heads=1)
def multi_query_einsum(m: Any, x: Tensor) -> Tensor:
    """One kv head without an axis for it."""
    q, k, v = m.q(x).view(B, T, H, D), m.k(x), m.v(x)
    weights = (torch.einsum("bshd,btd->bhst", q, k) * SCALE).softmax(-1)
    return m.o(torch.einsum("bhst,btd->bshd", weights, v).flatten(-2))


@whole(kv_heads=1)
def multi_query_folded_into_tokens(m: Any, x: Tensor) -> Tensor:
    """Heads are more queries of one kv head, tokens first: GPT-BigCode."""
    q, k, v = m.q(x).view(B, T * H, D), m.k(x), m.v(x)
    s = torch.bmm(q, k.transpose(1, 2)).view(B, T, H, T) * SCALE
    weights = s.masked_fill(~m.triangle[:, None, :], LEAST).softmax(-1)
    return m.o(torch.bmm(weights.view(B, T * H, T), v).view(B, T, C))


# --------------------------------------------------------------------------------------------------- head splits


@heads()
def split_by_reshape_and_permute(m: Any, x: Tensor) -> Heads:
    """reshape, permute."""
    q, k, v = (p(x).reshape(B, T, H, D).permute(0, 2, 1, 3) for p in (m.q, m.k, m.v))
    return q, k, v


@heads()
def split_by_unflatten(m: Any, x: Tensor) -> Heads:
    """unflatten, transpose: torchtune, torch's own tutorials."""
    q, k, v = (p(x).unflatten(-1, (H, D)).transpose(1, 2) for p in (m.q, m.k, m.v))
    return q, k, v


@heads()
def split_by_chunk(m: Any, x: Tensor) -> Heads:
    """Chunks of the channels, joined on a new axis."""
    q, k, v = (torch.stack(p(x).chunk(H, dim=-1), dim=1) for p in (m.q, m.k, m.v))
    return q, k, v


@whole()
def split_by_chunk_into_batch(m: Any, x: Tensor) -> Tensor:
    """Heads become batch by chunk and cat, and return the same way: the Transformer in TensorFlow style."""
    q, k, v = (torch.cat(p(x).chunk(H, dim=2), dim=0) for p in (m.q, m.k, m.v))  # [H*B, T, D]
    o = torch.bmm(scores(q, k).softmax(-1), v)
    return m.o(torch.cat(o.chunk(H, dim=0), dim=2))


def fused(width: int = 3 * C) -> dict[str, Callable[[], nn.Module]]:
    return dict(qkv=lambda: nn.Linear(C, width))


@heads(has=fused())
def fused_split(m: Any, x: Tensor) -> Heads:
    """One projection, torch.split into q, k, v: GPT-2, nanoGPT."""
    q, k, v = torch.split(m.qkv(x), C, dim=2)
    return split(q), split(k), split(v)


@heads(has=fused())
def fused_chunk(m: Any, x: Tensor) -> Heads:
    """One projection, chunk(3), heads by view."""
    q, k, v = (split(t) for t in m.qkv(x).chunk(3, dim=-1))
    return q, k, v


@heads(has=fused())
def fused_unbind(m: Any, x: Tensor) -> Heads:
    """One projection, [B, T, 3, H, D] unbound: flash-attention's callers."""
    q, k, v = m.qkv(x).view(B, T, 3, H, D).unbind(2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


@heads(has=fused())
def fused_permute_and_index(m: Any, x: Tensor) -> Heads:
    """One projection, [3, B, H, T, D] indexed: Swin, the first ViT of timm."""
    qkv = m.qkv(x).reshape(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
    return qkv[0], qkv[1], qkv[2]


@heads(has=fused())
def fused_key_first(m: Any, x: Tensor) -> Heads:
    """The order is k, q, v."""
    k, q, v = m.qkv(x).split(C, dim=-1)
    return split(q), split(k), split(v)


@heads(has=fused())
def fused_per_head(m: Any, x: Tensor) -> Heads:
    """[H, 3, D]: q, k, v of a head lie together: GPT-NeoX, Bloom."""
    q, k, v = m.qkv(x).view(B, T, H, 3 * D).transpose(1, 2).chunk(3, dim=-1)
    return q, k, v


@heads(has=fused((H + 2 * G) * D), kv_heads=G)
def fused_grouped(m: Any, x: Tensor) -> Heads:
    """[G, N + 2, D]: the queries of a group, its key, its value: Falcon's new decoder, InternLM 2."""
    qkv = m.qkv(x).view(B, T, G, N + 2, D)
    q, k, v = qkv[..., :-2, :], qkv[..., [-2], :], qkv[..., [-1], :]
    return q.flatten(2, 3).transpose(1, 2), k.flatten(2, 3).transpose(1, 2), v.flatten(2, 3).transpose(1, 2)


@heads(has=fused((H + 2 * G) * D), kv_heads=G)
def fused_uneven_split(m: Any, x: Tensor) -> Heads:
    """One projection, split into unequal parts: Phi-3, gpt-fast."""
    q, k, v = m.qkv(x).split([H * D, G * D, G * D], dim=-1)
    return split(q), split(k), split(v)


@heads(has=dict(kv=lambda: nn.Linear(C, 2 * C)))
def fused_key_value(m: Any, x: Tensor) -> Heads:
    """to_q alone, to_kv together: lucidrains, PVT."""
    k, v = m.kv(x).chunk(2, dim=-1)
    return split(m.q(x)), split(k), split(v)


# --------------------------------------------------------------------------------------------------- projections


@heads(has=dict(w=weight(3 * C, C)))
def slices_of_one_weight(m: Any, x: Tensor) -> Heads:
    """F.linear with rows of one weight: fairseq, nn.MultiheadAttention."""
    q, k, v = (split(F.linear(x, m.w[i * C : (i + 1) * C])) for i in range(3))
    return q, k, v


@heads()
def concatenated_weights(m: Any, x: Tensor) -> Heads:
    """torch.cat of three weights, one product: pipelines that fuse when they run."""
    w, b = torch.cat([m.q.weight, m.k.weight, m.v.weight]), torch.cat([m.q.bias, m.k.bias, m.v.bias])
    q, k, v = (split(t) for t in F.linear(x, w, b).chunk(3, dim=-1))
    return q, k, v


@heads(has=dict(w=weight(C, 3 * C), b=weight(3 * C)))
def addmm_projection(m: Any, x: Tensor) -> Heads:
    """addmm on flattened tokens, the weight is [in, out]: GPT-2's Conv1D."""
    q, k, v = torch.addmm(m.b, x.view(-1, C), m.w).view(B, T, 3 * C).split(C, dim=2)
    return split(q), split(k), split(v)


@heads(has=dict(w=weight(3, C, C)))
def matmul_projection(m: Any, x: Tensor) -> Heads:
    """x @ W with the matrices of q, k, v in one parameter."""
    q, k, v = split(x @ m.w[0]), split(x @ m.w[1]), split(torch.matmul(x, m.w[2]))
    return q, k, v


@heads(has=dict(w_q=weight(C, H, D), w_k=weight(C, G, D), w_v=weight(C, G, D)), kv_heads=G)
def einsum_projection(m: Any, x: Tensor) -> Heads:
    """Weights with an axis for heads: "btc,chd->bthd", JAX's DenseGeneral."""
    q, k, v = (torch.einsum("btc,chd->bthd", x, w).transpose(1, 2) for w in (m.w_q, m.w_k, m.w_v))
    return q, k, v


@whole(has=dict(w_q=weight(H, C, D), w_k=weight(H, C, D), w_v=weight(H, C, D), w_o=weight(H, D, C)))
def broadcast_projection(m: Any, x: Tensor) -> Tensor:
    """x [B, 1, T, C] @ W [H, C, D] and back by [H, D, C], summed over heads: TransformerLens."""
    q, k, v = x.unsqueeze(1) @ m.w_q, x.unsqueeze(1) @ m.w_k, x.unsqueeze(1) @ m.w_v
    return ((scores(q, k).softmax(-1) @ v) @ m.w_o).sum(1)


@whole(has=dict.fromkeys("qkvo", lambda: nn.Conv1d(C, C, 1)), inputs=lambda: (torch.randn(B, C, T),))
def conv1d_projection(m: Any, x: Tensor) -> Tensor:
    """Convolutions of width 1 on [B, C, T]: VITS, Glow-TTS."""
    q, k, v = (p(x).view(B, H, D, T).transpose(2, 3) for p in (m.q, m.k, m.v))
    o = torch.matmul(F.softmax(torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(D), dim=-1), v)
    return m.o(o.transpose(2, 3).contiguous().view(B, C, T))


def image() -> tuple[Any, ...]:
    return (torch.randn(B, C, WINDOWS, WINDOW),)


@whole(
    has=dict(q=lambda: nn.Conv2d(C, D, 1), k=lambda: nn.Conv2d(C, D, 1), v=lambda: nn.Conv2d(C, C, 1), gamma=weight(1)),
    inputs=image, heads=1, kv_heads=1,
)  # fmt: skip
def conv2d_projection(m: Any, x: Tensor) -> Tensor:
    """Pixels attend, keys narrower than values, no scale, bmm(v, weights^T), no output projection: SAGAN, non-local."""
    q, k, v = m.q(x).flatten(2).transpose(1, 2), m.k(x).flatten(2), m.v(x).flatten(2)
    weights = torch.softmax(torch.bmm(q, k) * SCALE, dim=-1)  # [B, S, T]
    return m.gamma * torch.bmm(v, weights.permute(0, 2, 1)).view_as(x) + x


@whole(has=dict(qkv=lambda: nn.Conv2d(C, 3 * C, 1, bias=False), o=lambda: nn.Conv2d(C, C, 1)), inputs=image)
def channels_before_pixels(m: Any, x: Tensor) -> Tensor:
    """[B, H, D, pixels] all the way, "bhdi,bhdj->bhij": attention in lucidrains' diffusion models."""
    q, k, v = (t.reshape(B, H, D, T) for t in m.qkv(x).chunk(3, dim=1))
    weights = torch.einsum("b h d i, b h d j -> b h i j", q * SCALE, k).softmax(dim=-1)
    o = torch.einsum("b h i j, b h d j -> b h i d", weights, v)
    return m.o(o.permute(0, 1, 3, 2).reshape(x.shape))


def normed_linear() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(settled(nn.Linear(C, C)))


@heads(has=dict.fromkeys("qk", normed_linear))
def weight_norm(m: Any, x: Tensor) -> Heads:
    """Weights that a parametrisation computes."""
    return m.split(x)


@heads(has=dict(a=weight(2, 4, C), b=weight(2, C, 4, fan=8)))
def low_rank_adapters(m: Any, x: Tensor) -> Heads:
    """q and v are sums of a linear map and one of rank 4: LoRA."""
    q = m.q(x) + F.linear(F.linear(x, m.a[0]), m.b[0]) * 2.0
    v = m.v(x) + (x @ m.a[1].T @ m.b[1].T) * 2.0
    return split(q), split(m.k(x)), split(v)


@heads(has=dict(codes=lambda: torch.randint(-127, 128, (3 * C, C), dtype=torch.int8), steps=weight(3 * C, 1)))
def dequantised_weights(m: Any, x: Tensor) -> Heads:
    """Weights of 8 bits times a learned step per row, multiplied out in the graph."""
    q, k, v = F.linear(x, m.codes.to(x.dtype) / 73.0 * m.steps.abs()).chunk(3, dim=-1)
    return split(q), split(k), split(v)


@heads(has=dict(where=weight(T, C, fan=4)))
def positions_on_queries_and_keys(m: Any, x: Tensor) -> Heads:
    """Positions are added before q and k, not before v: DETR."""
    q, k, _ = m.split(x + m.where)
    return q, k, split(m.v(x))


@whole()
def shared_keys_and_values(m: Any, x: Tensor) -> Tensor:
    """One projection is both key and value: Reformer's cousins."""
    q, kv = split(m.q(x)), split(m.k(x))
    return m.join(scores(q, kv).softmax(-1) @ kv)


@whole()
def shared_queries_and_keys(m: Any, x: Tensor) -> Tensor:
    """One projection is both query and key: Reformer; a token may not see itself unless it must."""
    q, v = split(m.q(x)), split(m.v(x))
    s = (q @ F.normalize(q, dim=-1).mT).masked_fill(torch.eye(T, dtype=torch.bool), -5e4)
    return m.join(s.softmax(-1) @ v)


@whole(has=dict(v=lambda: nn.Linear(C, H * 6), o=lambda: nn.Linear(H * 6, C)))
def values_of_another_size(m: Any, x: Tensor) -> Tensor:
    """Values have 6 channels a head, keys 8."""
    q, k, v = split(m.q(x)), split(m.k(x)), m.v(x).view(B, T, H, 6).transpose(1, 2)
    return m.o((scores(q, k).softmax(-1) @ v).transpose(1, 2).reshape(B, T, H * 6))


@heads(has=dict(k=lambda: nn.Conv1d(C, C, 3, padding=1, groups=C)))
def convolved_keys(m: Any, x: Tensor) -> Heads:
    """Keys see their neighbours: a depth-wise convolution before attention, as in CvT."""
    return split(m.q(x)), split(m.k(x.transpose(1, 2)).transpose(1, 2)), split(m.v(x))


@whole(has=dict(shrink=lambda: nn.Conv1d(C, C, 2, stride=2), norm=lambda: nn.LayerNorm(C)))
def strided_keys(m: Any, x: Tensor) -> Tensor:
    """Every second token is a key: spatial reduction of PVT and Segformer."""
    fewer = m.norm(m.shrink(x.transpose(1, 2)).transpose(1, 2))
    return m.join(scores(split(m.q(x)), split(m.k(fewer))).softmax(-1) @ split(m.v(fewer)))


@whole(has=dict(e=weight(T, 5, fan=T), f=weight(T, 5, fan=T)))
def projected_tokens(m: Any, x: Tensor) -> Tensor:
    """12 keys are mixed into 5: Linformer."""
    q, k, v = m.split(x)
    k, v = torch.einsum("bhtd,tr->bhrd", k, m.e), torch.einsum("bhtd,tr->bhrd", v, m.f)
    return m.join(scores(q, k * 2).softmax(-1) @ v)


# --------------------------------------------------------------------------------------------------- norms of q and k


def rms(t: Tensor, gain: Tensor) -> Tensor:
    return t * torch.rsqrt(t.float().pow(2).mean(-1, keepdim=True) + 1e-6).type_as(t) * gain


@heads(has=dict(gain=lambda: nn.Parameter(torch.rand(2, C) + 0.5)))
def norm_before_split(m: Any, x: Tensor) -> Heads:
    """RMSNorm by hand over all heads at once: OLMo 2."""
    return split(rms(m.q(x), m.gain[0])), split(rms(m.k(x), m.gain[1])), split(m.v(x))


@heads(has=dict(norm_q=lambda: nn.RMSNorm(D), norm_k=lambda: nn.RMSNorm(D)))
def norm_after_split(m: Any, x: Tensor) -> Heads:
    """nn.RMSNorm per head, before the transpose: Qwen 3, Gemma 3."""
    q, k = m.norm_q(m.q(x).view(B, T, H, D)), m.norm_k(m.k(x).view(B, T, H, D))
    return q.transpose(1, 2), k.transpose(1, 2), split(m.v(x))


@heads(has=dict(norm_q=lambda: nn.LayerNorm(D), norm_k=lambda: nn.LayerNorm(D)))
def layer_norm_after_split(m: Any, x: Tensor) -> Heads:
    """nn.LayerNorm per head: ViT-22B, timm's qk_norm, Persimmon."""
    q, k, v = m.split(x)
    return m.norm_q(q), m.norm_k(k), v


@whole()
def unit_length_before_split(m: Any, x: Tensor) -> Tensor:
    """F.normalize over all heads at once, a fixed factor of 20."""
    q, k = split(F.normalize(m.q(x), dim=-1)), split(F.normalize(m.k(x), dim=-1))
    return m.join(attend(q, k, split(m.v(x)), scale=20.0))


# --------------------------------------------------------------------------------------------------- rotations


def turns(size: int = D) -> dict[str, Callable[[], Tensor]]:
    """cos and sin [T, size / 2]."""
    return dict(cos=lambda: angles(size).cos(), sin=lambda: angles(size).sin())


def rotate_half(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels i and i + D/2 are a pair. cos, sin: [T, D / 2]."""
    first, second = t.chunk(2, dim=-1)
    return t * torch.cat([cos, cos], -1) + torch.cat([-second, first], -1) * torch.cat([sin, sin], -1)


@heads(has=turns())
def rope_half(m: Any, x: Tensor) -> Heads:
    """rotate_half: Llama in transformers."""
    q, k, v = m.split(x)
    return rotate_half(q, m.cos, m.sin), rotate_half(k, m.cos, m.sin), v


@heads(has=turns())
def rope_half_without_negation(m: Any, x: Tensor) -> Heads:
    """x1 cos - x2 sin, x2 cos + x1 sin, joined: gpt-oss, torchtitan's kernels."""

    def rotate(t: Tensor) -> Tensor:
        first, second = t[..., : D // 2], t[..., D // 2 :]
        return torch.cat([first * m.cos - second * m.sin, second * m.cos + first * m.sin], dim=-1)

    q, k, v = m.split(x)
    return rotate(q), rotate(k), v


@heads()
def rope_interleaved(m: Any, x: Tensor) -> Heads:
    """Channels 2i and 2i + 1 are a pair; stack, flatten; angles made in the graph: GPT-J, GLM."""
    frequency = 100.0 ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
    angle = torch.einsum("i,j->ij", torch.arange(T, dtype=torch.float32), frequency).repeat_interleave(2, dim=-1)

    def rotate(t: Tensor) -> Tensor:
        turned = torch.stack([-t[..., 1::2], t[..., ::2]], dim=-1).flatten(-2)
        return t * angle.cos() + turned * angle.sin()

    q, k, v = m.split(x)
    return rotate(q), rotate(k), v


@heads(has=turns())
def rope_before_transpose(m: Any, x: Tensor) -> Heads:
    """Pairs [.., D/2, 2] on heads behind tokens: gpt-fast."""
    cos, sin = m.cos[:, None], m.sin[:, None]  # [T, 1, D / 2]

    def rotate(t: Tensor) -> Tensor:
        pairs = t.view(B, T, H, D).reshape(B, T, H, -1, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(3).transpose(1, 2)

    return rotate(m.q(x)), rotate(m.k(x)), split(m.v(x))


@heads(has=dict(turn=lambda: torch.polar(torch.ones(T, D // 2), angles())))
def rope_complex(m: Any, x: Tensor) -> Heads:
    """view_as_complex times a complex table: llama's reference code."""

    def rotate(t: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(t.float().reshape(B, H, T, -1, 2)) * m.turn).flatten(3)

    q, k, v = m.split(x)
    return rotate(q).type_as(q), rotate(k).type_as(k), v


@heads(has=turns())
def rope_written_in_place(m: Any, x: Tensor) -> Heads:
    """Results are written to every second channel of an empty tensor."""

    def rotate(t: Tensor) -> Tensor:
        out, even, odd = torch.empty_like(t), t[..., ::2], t[..., 1::2]
        out[..., ::2] = even * m.cos - odd * m.sin
        out[..., 1::2] = odd * m.cos + even * m.sin
        return out

    q, k, v = m.split(x)
    return rotate(q), rotate(k), v


@heads(has=turns(4))
def rope_partial(m: Any, x: Tensor) -> Heads:
    """Only the first 4 of 8 channels turn: GPT-NeoX, Phi, StableLM."""

    def rotate(t: Tensor) -> Tensor:
        return torch.cat([rotate_half(t[..., :4], m.cos, m.sin), t[..., 4:]], dim=-1)

    q, k, v = m.split(x)
    return rotate(q), rotate(k), v


@heads(has=turns())
def rope_gathered(m: Any, x: Tensor) -> Heads:
    """cos and sin are looked up by position ids."""
    position = torch.arange(T).unsqueeze(0)
    cos, sin = m.cos[position].unsqueeze(1), m.sin[position].unsqueeze(1)  # [1, 1, T, D / 2]
    q, k, v = m.split(x)
    return rotate_half(q, cos, sin), rotate_half(k, cos, sin), v


@heads(has=turns(4))
def rope_axial(m: Any, x: Tensor) -> Heads:
    """A grid of 3 rows and 4 columns: half of the channels turn by row, half by column: vision RoPE."""
    row, column = torch.arange(T) // WINDOW, torch.arange(T) % WINDOW

    def rotate(t: Tensor) -> Tensor:
        by_row = rotate_half(t[..., :4], m.cos[row], m.sin[row])
        return torch.cat([by_row, rotate_half(t[..., 4:], m.cos[column], m.sin[column])], dim=-1)

    q, k, v = m.split(x)
    return rotate(q), rotate(k), v


@whole(
    has=dict(
        turns(4), q=lambda: nn.Linear(C, H * 12), kv_a=lambda: nn.Linear(C, 16 + 4), norm=lambda: nn.RMSNorm(16),
        kv_b=lambda: nn.Linear(16, H * 16),
    ),
    sites=0,
    reason="already latent",
)  # fmt: skip
def latent_keys(m: Any, x: Tensor) -> Tensor:
    """Keys of 8 + 4 channels written into an empty tensor; the rotated 4 are shared by the heads: DeepSeek."""
    q = m.q(x).view(B, T, H, 12).transpose(1, 2)
    latent, shared = m.kv_a(x).split([16, 4], dim=-1)
    k_plain, v = m.kv_b(m.norm(latent)).view(B, T, H, 16).transpose(1, 2).split([8, 8], dim=-1)
    q = torch.cat([q[..., :8], rotate_half(q[..., 8:], m.cos, m.sin)], dim=-1)
    k = k_plain.new_empty(B, H, T, 12)
    k[..., :8].copy_(k_plain)
    k[..., 8:].copy_(rotate_half(shared.unsqueeze(1), m.cos, m.sin).expand(-1, H, -1, -1))
    return m.join(attend(q, k, v, is_causal=True))


# --------------------------------------------------------------------------------------------------- around the core


@whole(sites=H, heads=1, kv_heads=1)
def loop_over_heads(m: Any, x: Tensor) -> Tensor:
    """A Python loop over heads, results concatenated: one site for each head."""
    q, k, v = m.q(x).chunk(H, -1), m.k(x).chunk(H, -1), m.v(x).chunk(H, -1)
    return m.o(torch.cat([scores(q[h], k[h]).softmax(-1) @ v[h] for h in range(H)], dim=-1))


@whole(has=dict(gate=lambda: nn.Linear(C, C)))
def gated_output(m: Any, x: Tensor) -> Tensor:
    """o * sigmoid(gate(x)) before the output projection: AlphaFold, Qwen3-Next."""
    o = attend(*m.split(x)).transpose(1, 2).reshape(B, T, C)
    return m.o(o * torch.sigmoid(m.gate(x)))


@whole()
def no_output_projection(m: Any, x: Tensor) -> Tensor:
    """Heads are concatenated and added to the input."""
    return x + attend(*m.split(x)).transpose(1, 2).flatten(2)


@whole()
def weights_returned(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Attention weights are a second output: need_weights, output_attentions."""
    q, k, v = m.split(x)
    weights = scores(q, k).softmax(-1)
    return m.join(weights @ v), weights


@whole(inputs=lambda: (torch.randn(T, B, C),))
def sequence_first(m: Any, x: Tensor) -> Tensor:
    """[T, B, C] and heads in the batch by view and transpose: fairseq."""
    q, k, v = (p(x).contiguous().view(T, B * H, D).transpose(0, 1) for p in (m.q, m.k, m.v))
    weights = F.softmax(torch.bmm(q * SCALE, k.transpose(1, 2)), dim=-1)
    return m.o(torch.bmm(weights, v).transpose(0, 1).contiguous().view(T, B, C))


@whole(inputs=lambda: (torch.randn(T, C),))
def without_batch(m: Any, x: Tensor) -> Tensor:
    """One sequence [T, C], heads in front: [H, T, D]."""
    q, k, v = (p(x).view(T, H, D).transpose(0, 1) for p in (m.q, m.k, m.v))
    return m.o((scores(q, k).softmax(-1) @ v).transpose(0, 1).reshape(T, C))


@core()
def autocast_switched_off(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A region that keeps float32 under autocast: GPT-2's reordered attention, diffusion models."""
    with torch.autocast("cpu", enabled=False):
        return scores(q.float(), k.float()).softmax(-1) @ v.float()


@whole(inputs=lambda: (torch.randn(B, WINDOWS, WINDOW, C),))
def along_one_axis(m: Any, x: Tensor) -> Tensor:
    """[B, R, H, T, D]: two batch axes, tokens attend within their row."""
    q, k, v = (p(x).view(B, WINDOWS, WINDOW, H, D).transpose(2, 3) for p in (m.q, m.k, m.v))
    return m.o((scores(q, k).softmax(-1) @ v).transpose(2, 3).flatten(-2))


@whole(has=dict(pair=lambda: nn.Linear(6, H, bias=False)), inputs=lambda: (*tokens(), torch.randn(B, T, T, 6)))
def pair_bias(m: Any, x: Tensor, pairs: Tensor) -> Tensor:
    """A bias per head, projected from a table of pairs: AlphaFold, Graphormer."""
    q, k, v = (p(x).view(B, T, H, D) for p in (m.q, m.k, m.v))
    s = torch.einsum("bqhc,bkhc->bhqk", q * SCALE, k) + m.pair(pairs).permute(0, 3, 1, 2)
    return m.o(torch.einsum("bhqk,bkhc->bqhc", torch.softmax(s, -1), v).reshape(B, T, C))


@core(has=dict(memory=weight(2, H, 3, D, fan=1)))
def learned_prefix(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Learned keys and values stand before those of the text: prefix tuning, persistent memory."""
    k = torch.cat([m.memory[0].expand(B, -1, -1, -1), k], dim=2)
    return attend(q, k, torch.cat([m.memory[1].expand(B, -1, -1, -1), v], dim=2))


@core()
def zero_key(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A key and a value of zeros are appended: add_zero_attn of nn.MultiheadAttention."""
    k = torch.cat([k, torch.zeros(B, H, 1, D)], dim=2)
    return attend(q, k, F.pad(v, (0, 0, 0, 1)))


# --------------------------------------------------------------------------------------------------- caches and cross


def decode_step(
    kv_heads: int, *more: Callable[[], Tensor], layout: str = "heads first"
) -> Callable[[], tuple[Any, ...]]:
    """Maker of a new token, keys and values of P earlier ones (or room for P, the last two free), and `more`."""
    shape = (B, kv_heads, P, D) if layout == "heads first" else (B, P, kv_heads, D)
    return lambda: (torch.randn(B, 1, C), torch.randn(shape), torch.randn(shape), *(make() for make in more))


@whole(inputs=decode_step(G), kv_heads=G, step="decode")
def cache_by_cat(m: Any, x: Tensor, past_k: Tensor, past_v: Tensor) -> Heads:
    """The past is an input, the longer one an output: GPT-2, DynamicCache."""
    q, k, v = m.split(x)
    k, v = torch.cat([past_k, k], dim=-2), torch.cat((past_v, v), dim=-2)
    return m.join(attend(q, k, v)), k, v


@whole(inputs=decode_step(G), kv_heads=G, step="decode")
def cache_by_cat_and_eager_scores(m: Any, x: Tensor, past_k: Tensor, past_v: Tensor) -> Heads:
    """The same with repeated heads and a softmax."""
    q, k, v = m.split(x)
    k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    k_all, v_all = k.repeat_interleave(N, 1), v.repeat_interleave(N, 1)
    return m.join(scores(q, k_all).softmax(-1) @ v_all), k, v


@whole(inputs=decode_step(H, layout="tokens first"), step="decode")
def cache_by_cat_tokens_first(m: Any, x: Tensor, past_k: Tensor, past_v: Tensor) -> Heads:
    """[B, T, H, D] is what is kept: TransformerLens, Flax habits."""
    q, k, v = (p(x).view(B, 1, H, D) for p in (m.q, m.k, m.v))
    k, v = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
    weights = (torch.einsum("bshd,bthd->bhst", q, k) * SCALE).softmax(-1)
    return m.o(torch.einsum("bhst,bthd->bshd", weights, v).reshape(B, 1, C)), k, v


@whole(inputs=decode_step(H, lambda: torch.tensor([P - 2])), step="decode static")
def cache_by_index_copy(m: Any, x: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor) -> Tensor:
    """index_copy_ into a buffer, which is then read: StaticCache."""
    q, k, v = m.split(x)
    cache_k.index_copy_(2, position, k)
    cache_v.index_copy_(2, position, v)
    return m.join(attend(q, cache_k, cache_v, attn_mask=torch.arange(P)[None, :] <= position))


@whole(inputs=decode_step(G, lambda: torch.tensor([P - 2])), kv_heads=G, step="decode static")
def cache_by_index_put(m: Any, x: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor) -> Tensor:
    """cache[:, :, position] = k with a tensor as position: gpt-fast."""
    q, k, v = m.split(x)
    cache_k[:, :, position] = k
    cache_v[:, :, position] = v
    s = scores(q, cache_k.repeat_interleave(N, 1)).masked_fill(torch.arange(P) > position, -math.inf)
    return m.join(s.softmax(-1) @ cache_v.repeat_interleave(N, 1))


@whole(inputs=decode_step(H, layout="heads first"), step="decode static")
def cache_by_slice(m: Any, x: Tensor, cache_k: Tensor, cache_v: Tensor) -> Tensor:
    """cache[:, :, p:p+1] = k with a number as position; only what is filled is read."""
    q, k, v = m.split(x)
    position = P - 2
    cache_k[:, :, position : position + 1] = k
    cache_v[:, :, position : position + 1] = v
    return m.join(attend(q, cache_k[:, :, : position + 1], cache_v[:, :, : position + 1]))


@whole(inputs=decode_step(H), step="decode static")
def cache_rolled(m: Any, x: Tensor, cache_k: Tensor, cache_v: Tensor) -> Tensor:
    """The oldest token leaves, copy_ puts the rolled window back: sliding StaticCache."""
    q, k, v = m.split(x)
    window_k, window_v = cache_k.roll(-1, dims=2), cache_v.roll(-1, dims=2)
    window_k[:, :, -1:] = k
    window_v[:, :, -1:] = v
    cache_k.copy_(window_k)
    cache_v.copy_(window_v)
    return m.join(attend(q, window_k, window_v))


@whole(inputs=lambda: (*tokens(), torch.randn(B, P, C)))
def cross(m: Any, x: Tensor, memory: Tensor) -> Tensor:
    """Keys and values are projected from another sequence."""
    return m.join(scores(split(m.q(x)), split(m.k(memory))).softmax(-1) @ split(m.v(memory)))


@whole(inputs=lambda: (*tokens(), torch.randn(B, H, P, D), torch.randn(B, H, P, D)))
def cross_with_bare_keys(m: Any, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values come projected: decoding with a cross-attention cache."""
    return m.join(attend(split(m.q(x)), k, v))


@whole(has=dict(seeds=weight(5, C, fan=1)))
def learned_queries(m: Any, x: Tensor) -> Tensor:
    """Queries are projected from a parameter: Q-Former, Perceiver."""
    q = split(m.q(m.seeds.expand(B, -1, -1)))
    return m.join(scores(q, split(m.k(x))).softmax(-1) @ split(m.v(x)))


@whole(has=dict(seeds=weight(H, 5, D, fan=1)))
def bare_learned_queries(m: Any, x: Tensor) -> Tensor:
    """Queries are a parameter, unprojected: pooling by learned queries."""
    return m.join(attend(m.seeds.expand(B, -1, -1, -1), split(m.k(x)), split(m.v(x))))


# --------------------------------------------------------------------------------------------------- explained


@core(sites=0, has=dict(before=weight(H, H, fan=H), after=weight(H, H, fan=H)))
def talking_heads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads are mixed before and after the softmax."""
    weights = torch.einsum("bhst,hg->bgst", scores(q, k), m.before).softmax(-1)
    return torch.einsum("bhst,hg->bgst", weights, m.after) @ v


@core(sites=0, has=dict(after=lambda: nn.Conv2d(H, H, 1, bias=False)))
def heads_mixed_after_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A 1x1 convolution over the heads of the weights: DeepViT, CaiT."""
    return m.after(scores(q, k).softmax(-1)) @ v


@core(sites=0, has=dict(importance=lambda: torch.linspace(0, 1, H).view(1, H, 1, 1)))
def head_mask(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights times a number per head: BERT's head_mask."""
    return (scores(q, k).softmax(-1) * m.importance) @ v


@core(sites=0, has=dict(decay=lambda: 0.9 ** (torch.arange(T)[:, None] - torch.arange(T)).abs()))
def gate_after_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights times a decay with the distance, not normalised again."""
    return (scores(q, k).softmax(-1) * m.decay) @ v


@core(sites=0)
def masked_and_normalised_again(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(s * mask) * mask over its sum: AllenNLP's masked_softmax."""
    weights = (scores(q, k) * m.triangle).softmax(-1) * m.triangle
    return (weights / (weights.sum(-1, keepdim=True) + 1e-13)) @ v


@core(sites=0)
def sigmoid_attention(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """sigmoid(s - log T) in the place of a softmax."""
    return torch.sigmoid(scores(q, k) - math.log(T)) @ v


@core(sites=0)
def squared_relu_attention(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """relu(s)**2 over T: Primer's gated attention unit."""
    return (F.relu(scores(q, k)).square() / T) @ v


@core(sites=0)
def top_k_sparse(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Only the four best keys of a query count."""
    s = scores(q, k)
    least = s.topk(4, dim=-1).values[..., -1:]
    return s.masked_fill(s < least, float("-inf")).softmax(-1) @ v


@core(sites=0, explained=0)
def sparsemax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The projection of the scores onto the simplex, entmax of alpha 2."""
    s = scores(q, k)
    ordered = s.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    rank = torch.arange(1, T + 1)
    size = (ordered * rank > excess).sum(-1, keepdim=True)
    return (s - excess.gather(-1, size - 1) / size).clamp(min=0) @ v


@core(sites=0, explained=2, has=dict(share=lambda: nn.Parameter(torch.tensor(0.4))))
def differential_attention(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The difference of two softmaxes meets the values: Differential Transformer."""
    (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
    return ((q1 @ k1.mT / 2).softmax(-1) - m.share * (q2 @ k2.mT / 2).softmax(-1)) @ v


@core(sites=0)
def distance_attention(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax of minus the distance: Lipschitz attention."""
    return (-torch.cdist(q, k)).softmax(-1) @ v


@core(sites=0)
def softmax_over_both_axes(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The product of the softmaxes over keys and over queries: dual softmax of LoFTR, with values."""
    s = scores(q, k)
    return (s.softmax(-1) * s.softmax(-2)) @ v


@whole(sites=0, has=dict(temperature=lambda: nn.Parameter(torch.full((H, 1, 1), 3.0))))
def channel_attention(m: Any, x: Tensor) -> Tensor:
    """Channels attend to channels, the contraction runs over tokens: XCiT, Restormer."""
    q, k, v = (p(x).view(B, T, H, D).permute(0, 2, 3, 1) for p in (m.q, m.k, m.v))  # [B, H, D, T]
    weights = ((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * m.temperature).softmax(-1)  # [B, H, D, D]
    return m.o((weights @ v).permute(0, 3, 1, 2).reshape(B, T, C))


__all__ = ["ENTRIES", "Functional", "settled", "weight"]
