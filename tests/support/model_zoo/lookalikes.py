"""Look-alikes, one function each: a softmax near contractions that is not attention, and attention without softmax.

Attention here means that queries, keys and values all come from activations, and queries or keys through a projection.
Letters: B batch, T tokens, C channels, E experts (or slots, classes, atoms: a count other than T).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo import Entry, ZooCase
from model_zoo.functional import Functional, Run, settled, weight

B, T, C, E = 2, 12, 16, 4

ENTRIES: list[Entry] = []


def tokens() -> tuple[Any, ...]:
    return (torch.randn(B, T, C),)


def image() -> tuple[Any, ...]:
    return (torch.randn(B, C, 3, 4),)


def look_alike(inputs: Callable[[], tuple[Any, ...]] = tokens, explained: int = 0, **has: Any) -> Callable[[Run], Run]:
    """Return a decorator that makes `f(m, *inputs)` an entry; `has` makes the members of m."""

    def add(function: Run) -> Run:
        def build() -> ZooCase:
            torch.manual_seed(1)
            return ZooCase(settled(Functional(function, has)), inputs())

        ENTRIES.append(Entry(function.__name__, "look-alike", build, sites=0, explained=explained))
        return function

    return add


def linear(out: int, fan: int = C) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(fan, out)


# --------------------------------------------------------------------------------------------------- routing


@look_alike(router=linear(E), w1=weight(E, C, 8, fan=C), w2=weight(E, 8, C, fan=8))
def mixture_of_experts(m: Any, x: Tensor) -> Tensor:
    """Softmax gates on the outputs of all experts, contracted over experts."""
    gates = m.router(x).softmax(-1)  # [B, T, E]
    outputs = torch.einsum("bteh,ehc->btec", F.gelu(torch.einsum("btc,ech->bteh", x, m.w1)), m.w2)
    return torch.einsum("bte,btec->btc", gates, outputs)


@look_alike(router=linear(E), w=weight(E, C, C, fan=C))
def mixture_of_two_experts(m: Any, x: Tensor) -> Tensor:
    """Top-2 of a softmax, renormalized, experts gathered: Mixtral."""
    gates, chosen = m.router(x).softmax(-1, dtype=torch.float32).topk(2, dim=-1)  # [B, T, 2]
    gates = gates / gates.sum(-1, keepdim=True)
    outputs = torch.einsum("btc,btkcd->btkd", x, m.w[chosen])
    return (gates.unsqueeze(-1) * outputs).sum(-2)


@look_alike(phi=weight(C, E), w=weight(E, C, C, fan=C))
def soft_mixture_of_experts(m: Any, x: Tensor) -> Tensor:
    """Softmax over tokens to dispatch, softmax over slots to combine: Soft MoE. Each has two contractions."""
    logits = x @ m.phi  # [B, T, E]
    slots = logits.softmax(dim=1).transpose(1, 2) @ x  # [B, E, C]
    return logits.softmax(dim=-1) @ torch.einsum("bec,ecd->bed", slots, m.w)


@look_alike(router=linear(E), experts=weight(E, C, fan=1))
def mixture_of_vectors(m: Any, x: Tensor) -> Tensor:
    """Multiply the softmax of a projection by a parameter."""
    return m.router(x).softmax(-1) @ m.experts


# --------------------------------------------------------------------------------------------------- classes and tables


@look_alike(head=linear(20), table=lambda: nn.Embedding(20, C))
def soft_embedding(m: Any, x: Tensor) -> Tensor:
    """Average embeddings under a classifier: soft decoding, differentiable text."""
    return torch.softmax(m.head(x), dim=-1) @ m.table.weight


@look_alike(table=lambda: nn.Embedding(20, C))
def soft_embedding_with_tied_head(m: Any, x: Tensor) -> Tensor:
    """Average embeddings with tied classifier weights: keys and values are one parameter."""
    return F.softmax(F.linear(x, m.table.weight) / math.sqrt(C), dim=-1) @ m.table.weight


@look_alike(head=linear(20), codes=weight(20, C, fan=1))
def gumbel_quantiser(m: Any, x: Tensor) -> Tensor:
    """Codes mixed by a tempered softmax with fixed noise: vector quantisers of wav2vec 2 and DALL-E's VAE."""
    noise = -torch.log(-torch.log((torch.arange(20) + 0.5) / 20))
    return torch.einsum("btn,nd->btd", F.softmax((m.head(x) + noise) / 0.9, dim=-1), m.codes)


@look_alike(lambda: (torch.randn(B, C),), head=linear(E * 11), atoms=lambda: torch.linspace(-2, 2, 11))
def value_distribution(m: Any, x: Tensor) -> Tensor:
    """Average returns over atoms for each action: C51."""
    return m.head(x).view(B, E, 11).softmax(-1) @ m.atoms


@look_alike(scores=linear(10), first=linear(10), second=linear(C, 10))
def classes_into_a_layer(m: Any, x: Tensor) -> Tensor:
    """Feed class probabilities to the next linear layer: stacked classifiers."""
    return m.second(F.softmax(m.scores(x), dim=-1) + F.softmax(m.first(x), dim=-1))


@look_alike(keys=linear(8), values=linear(C, 8))
def external_memory(m: Any, x: Tensor) -> Tensor:
    """Two linear maps with a softmax between: "external attention", an MLP."""
    return m.values(torch.softmax(m.keys(x), dim=-1))


@look_alike(lambda: (torch.randn(B, C),), query=linear(8), memory=weight(10, 8, fan=1))
def content_addressing(m: Any, x: Tensor) -> Tensor:
    """Average the rows of a memory by cosine similarity: the Neural Turing Machine."""
    similarity = F.cosine_similarity(m.query(x)[:, None], m.memory[None], dim=-1)
    return (similarity * 5.0).softmax(-1) @ m.memory


@look_alike(query=linear(8), memory=weight(10, 8, fan=1))
def stored_patterns(m: Any, x: Tensor) -> Tensor:
    """Retrieve patterns from a parameter: a modern Hopfield layer with a trained memory."""
    return F.scaled_dot_product_attention(m.query(x), m.memory.expand(B, -1, -1), m.memory.expand(B, -1, -1))


@look_alike(lambda: (torch.randn(B, C), torch.randn(B, C)), to_logits=linear(11))
def sampling_with_temperature(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token probabilities, truncated, and the entropy of another head."""
    logits = m.to_logits(x) / 0.7
    logits = logits.masked_fill(logits < logits.topk(5).values[..., -1:], float("-inf"))
    p = m.to_logits(y).softmax(-1)
    return logits.softmax(-1), -(p * p.log()).sum(-1)


# --------------------------------------------------------------------------------------------------- gates and pools


@look_alike(image, narrow=linear(8), wide=linear(2 * C, 8))
def selective_kernel(m: Any, x: Tensor) -> Tensor:
    """Branches of different receptive fields, weighted by a softmax for each channel: SKNet."""
    near, far = F.avg_pool2d(x, 3, stride=1, padding=1), F.avg_pool2d(x, 5, stride=1, padding=2)
    gates = m.wide(F.relu(m.narrow((near + far).mean((2, 3))))).view(B, 2, C, 1, 1).softmax(dim=1)
    return (torch.stack([near, far], dim=1) * gates).sum(1)


@look_alike(image, squeeze=linear(4), excite=linear(C, 4))
def squeeze_and_excitation(m: Any, x: Tensor) -> Tensor:
    """Gate channels by a softmax over channels."""
    gates = F.softmax(m.excite(F.relu(m.squeeze(x.mean((2, 3))))), dim=-1)
    return x * gates[..., None, None] * C


@look_alike(score=linear(1))
def attention_pooling(m: Any, x: Tensor) -> Tensor:
    """softmax(x w) over tokens, then the weighted sum of x: multiple-instance learning."""
    return (m.score(x).softmax(dim=1) * x).sum(dim=1)


@look_alike(w=weight(C))
def attention_pooling_by_bmm(m: Any, x: Tensor) -> Tensor:
    """Pool states by a softmax of scores, with a vector and bmm: document classifiers on recurrent networks."""
    return torch.bmm((x @ m.w).softmax(-1).unsqueeze(1), x).squeeze(1)


@look_alike(w1=linear(8), w2=linear(E, 8))
def structured_pooling(m: Any, x: Tensor) -> Tensor:
    """E weighted means of tokens, with scores from an MLP: structured self-attentive sentences."""
    return m.w2(torch.tanh(m.w1(x))).softmax(dim=1).transpose(1, 2) @ x


@look_alike(image, mask=lambda: nn.Conv2d(C, 1, 1), transform=lambda: nn.Conv2d(C, C, 1))
def global_context(m: Any, x: Tensor) -> Tensor:
    """One softmax over pixels for all queries: GCNet."""
    weights = m.mask(x).flatten(2).softmax(-1)  # [B, 1, pixels]
    return x + m.transform(torch.bmm(x.flatten(2), weights.transpose(1, 2)).unsqueeze(-1))


@look_alike(a=linear(C), b=linear(C))
def gated_linear_unit(m: Any, x: Tensor) -> Tensor:
    """Take a softmax as the gate of a GLU."""
    return m.a(x) * m.b(x).softmax(-1)


@look_alike(mixer=weight(T, T, fan=1))
def learned_token_mixing(m: Any, x: Tensor) -> Tensor:
    """Mix tokens by the softmax of a parameter: the random Synthesizer."""
    return m.mixer.softmax(-1) @ x


@look_alike(w1=linear(8), w2=linear(T, 8), v=linear(C))
def dense_synthesizer(m: Any, x: Tensor) -> Tensor:
    """Compute the scores of all keys from the query only: the dense Synthesizer."""
    return m.w2(F.relu(m.w1(x))).softmax(-1) @ m.v(x)


# --------------------------------------------------------------------------------------------------- similarities


@look_alike(explained=1)
def raw_self_similarity(m: Any, x: Tensor) -> Tensor:
    """softmax(x x^T) x: attention's form without projections; must be reported."""
    return (x @ x.mT / math.sqrt(C)).softmax(-1) @ x


@look_alike(image, gamma=weight(1))
def raw_channel_similarity(m: Any, x: Tensor) -> Tensor:
    """Channels weighted by their similarity, without projections: DANet's channel branch."""
    flat = x.flatten(2)
    energy = torch.bmm(flat, flat.transpose(1, 2)) / 12**0.5
    weights = (energy.max(-1, keepdim=True).values - energy).softmax(-1)
    return m.gamma * torch.bmm(weights, flat).view_as(x) + x


@look_alike(lambda: (torch.randn(B * T, C), torch.randn(B * T, C)), x_map=linear(8), y_map=linear(8))
def contrastive_loss(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Softmax of similarities of two projections, no third operand: CLIP, InfoNCE."""
    s = F.normalize(m.x_map(x), dim=-1) @ F.normalize(m.y_map(y), dim=-1).T * 10.0
    label = torch.arange(B * T)
    return (F.cross_entropy(s, label) + F.cross_entropy(s.T, label)) / 2


@look_alike(lambda: (torch.randn(B, T, C), torch.randn(B, T, C)), x_map=linear(8), y_map=linear(8))
def dual_softmax_matching(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Confidence of matches as the product of two softmaxes: LoFTR."""
    s = torch.einsum("bsc,btc->bst", m.x_map(x), m.y_map(y)) / 8**0.5
    return s.softmax(1) * s.softmax(2)


@look_alike(query=linear(8), key=linear(8))
def pointer_distribution(m: Any, x: Tensor) -> Tensor:
    """Scaled scores of queries and keys whose softmax is the result: pointer networks with dot products."""
    return (m.query(x) @ m.key(x).mT / 8**0.5).log_softmax(-1)


@look_alike(lambda: (torch.randn(B, T, C), torch.randn(B, T, C)), x_map=linear(8), y_map=linear(8))
def sinkhorn(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Normalize rows and columns alternately, then average y: optimal transport."""
    s = m.x_map(x) @ m.y_map(y).mT / 8**0.5
    for _ in range(3):
        s = s - s.logsumexp(-1, keepdim=True)
        s = s - s.logsumexp(-2, keepdim=True)
    return s.exp() @ y


@look_alike(emit=linear(E), transition=weight(E, E, fan=1))
def conditional_random_field(m: Any, x: Tensor) -> Tensor:
    """Run the forward algorithm: logsumexp over states, step after step."""
    emissions = m.emit(x)
    alpha = emissions[:, 0]
    for step in range(1, 4):
        alpha = torch.logsumexp(alpha[:, :, None] + m.transition, dim=1) + emissions[:, step]
    return alpha.logsumexp(-1)


@look_alike(emit=linear(E), transition=weight(E, E, fan=1))
def hidden_markov_model(m: Any, x: Tensor) -> Tensor:
    """Softmaxed transitions multiply beliefs."""
    likelihood = m.emit(x).softmax(-1)
    belief = likelihood[:, 0]
    for step in range(1, 4):
        belief = (belief @ m.transition.softmax(-1)) * likelihood[:, step]
    return belief


# --------------------------------------------------------------------------------------------------- kernels and grids


@look_alike(kernel=linear(E * 3))
def dynamic_convolution(m: Any, x: Tensor) -> Tensor:
    """Kernels of width 3, a softmax over taps, per token and head: Wu et al. 2019."""
    taps = m.kernel(x).view(B, T, E, 1, 3).softmax(-1)
    windows = F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).reshape(B, T, E, C // E, 3)
    return (windows * taps).sum(-1).reshape(B, T, C)


@look_alike(image, score=linear(E), kernels=weight(E, C, C, 1, 1, fan=C))
def mixture_of_kernels(m: Any, x: Tensor) -> Tensor:
    """Mix whole kernels by a softmax for each image: dynamic convolution by Chen et al. 2020."""
    gates = m.score(x.mean((2, 3))).softmax(-1)  # [B, E]
    kernels = torch.einsum("be,eoikl->boikl", gates, m.kernels).reshape(B * C, C, 1, 1)
    return F.conv2d(x.reshape(1, B * C, 3, 4), kernels, groups=B).view(B, C, 3, 4)


@look_alike(image, heat=lambda: nn.Conv2d(C, E, 1))
def soft_argmax(m: Any, x: Tensor) -> Tensor:
    """Average coordinates under a heat map: key points."""
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    grid = torch.stack([rows, columns], dim=-1).view(12, 2)
    return m.heat(x).flatten(2).softmax(-1) @ grid  # [B, E, 2]


@look_alike(offsets=linear(E * 2), weights=linear(E), v=linear(C), o=linear(C))
def deformable_sampling(m: Any, x: Tensor) -> Tensor:
    """Sample values at predicted positions, with weights predicted from the query only: Deformable DETR."""
    where = m.offsets(x).view(B, T, E, 2).tanh()
    sampled = F.grid_sample(m.v(x).transpose(1, 2).reshape(B, C, 3, 4), where, align_corners=False)  # [B, C, T, E]
    weights = m.weights(x).softmax(-1).unsqueeze(1)
    return m.o((sampled * weights).sum(-1).transpose(1, 2))


# --------------------------------------------------------------------------------------------------- linear attention


def projections() -> dict[str, Any]:
    return {name: linear(C) for name in "qkvo"}


@look_alike(**projections())
def efficient_attention(m: Any, x: Tensor) -> Tensor:
    """softmax(q) (softmax over tokens(k)^T v): Shen et al. 2018."""
    q, k, v = (p(x).view(B, T, 2, 8).transpose(1, 2) for p in (m.q, m.k, m.v))
    context = k.softmax(dim=-2).transpose(-1, -2) @ v  # [B, 2, 8, 8]
    return m.o((q.softmax(dim=-1) @ context).transpose(1, 2).reshape(B, T, C))


@look_alike(image, qkv=lambda: nn.Conv2d(C, 3 * C, 1), o=lambda: nn.Conv2d(C, C, 1))
def efficient_attention_on_pixels(m: Any, x: Tensor) -> Tensor:
    """Attend linearly on [B, H, D, pixels] by einsum: diffusion models."""
    q, k, v = (t.reshape(B, 2, 8, 12) for t in m.qkv(x).chunk(3, dim=1))
    context = torch.einsum("b h d n, b h e n -> b h d e", k.softmax(dim=-1), v)
    return m.o(torch.einsum("b h d e, b h d n -> b h e n", context, q.softmax(dim=-2) * 8**-0.5).reshape(x.shape))


@look_alike(**projections())
def linear_attention(m: Any, x: Tensor) -> Tensor:
    """Attend with elu + 1 as feature map and a division by the sum: Katharopoulos et al. 2020."""
    q, k, v = F.elu(m.q(x)) + 1, F.elu(m.k(x)) + 1, m.v(x)
    return m.o((q @ (k.mT @ v)) / (q @ k.sum(1).unsqueeze(-1)))


@look_alike(features=lambda: torch.randn(C, 24), **projections())
def random_features(m: Any, x: Tensor) -> Tensor:
    """exp(w x - |x|^2 / 2) as feature map: Performer."""

    def features(t: Tensor) -> Tensor:
        t = t * C**-0.25
        return torch.exp(t @ m.features - t.square().sum(-1, keepdim=True) / 2) + 1e-4

    q, k, v = features(m.q(x)), features(m.k(x)), m.v(x)
    return m.o((q @ (k.mT @ v)) / (q @ k.sum(1).unsqueeze(-1)))


@look_alike(decay=lambda: (0.9 ** (torch.arange(T)[:, None] - torch.arange(T))).tril(), **projections())
def retention(m: Any, x: Tensor) -> Tensor:
    """(q k^T * decay) v without a softmax: RetNet, linear attention in quadratic form."""
    return m.o(((m.q(x) @ m.k(x).mT) * m.decay / math.sqrt(C)) @ m.v(x))


@look_alike(bias=weight(T, T, fan=1), **projections())
def attention_free(m: Any, x: Tensor) -> Tensor:
    """Average values by exp(k + bias) per channel, with a gate instead of queries: AFT."""
    e = torch.exp(m.k(x)[:, None] + m.bias[None, :, :, None])  # [B, S, T, C]
    return m.o(torch.sigmoid(m.q(x)) * (e * m.v(x)[:, None]).sum(2) / e.sum(2))
