"""A small encoder and folders of small models, for commands that load a model by name."""

from __future__ import annotations

from pathlib import Path

import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from fhopt.cli.app import main


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


class Encoder(nn.Module):
    """One attention, and a softmax that is not attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({n: nn.Linear(32, 32) for n in "qkvo"})
        self.gate = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.attention[n](x).view(1, -1, 4, 8).transpose(1, 2) for n in "qkv")
        o = nn.functional.scaled_dot_product_attention(q, k, v)
        y = self.attention["o"](o.transpose(1, 2).reshape(x.shape))
        return y * self.gate(x).softmax(-1)[..., :1]


def encoder() -> tuple[nn.Module, tuple[Tensor]]:
    return Encoder(), (torch.randn(1, 6, 32),)


def not_a_model() -> int:
    return 3


def make_unwritable(folder: Path) -> str:
    """Return a path below a file, where no user, root included, can create a folder."""
    (folder / "file").write_text("")
    return str(folder / "file" / "below")


class GraphBreak(Encoder):
    """A forward pass with a graph break."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch._dynamo.graph_break()
        return super().forward(y)


def broken() -> tuple[nn.Module, tuple[Tensor]]:
    return GraphBreak(), (torch.randn(1, 6, 32),)


def save_tiny_model(folder: Path, scale: float = 1.0) -> None:
    """Save a Hugging Face folder with a character-level tokenizer. scale: factor on the weights."""
    from small_models import tiny_llama
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["[UNK]", *"abcdefghijklmnopqrstuvwxyz .,\n()'=:_"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    model = tiny_llama()
    with torch.no_grad():
        for weight in model.parameters():
            weight *= scale
    model.save_pretrained(folder)
