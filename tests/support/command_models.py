"""A small encoder, and folders of small models, for commands that take a model by its name."""

from __future__ import annotations

from pathlib import Path

import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from fhopt.cli.app import main


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


class Encoder(nn.Module):
    """One attention and a softmax that is none."""

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
    """A path below a file: nobody can make a folder there, root included."""
    (folder / "file").write_text("")
    return str(folder / "file" / "below")


class Broken(Encoder):
    """A forward pass that falls into two graphs."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch._dynamo.graph_break()
        return super().forward(y)


def broken() -> tuple[nn.Module, tuple[Tensor]]:
    return Broken(), (torch.randn(1, 6, 32),)


def save_tiny_model(folder: Path, scale: float = 1.0) -> None:
    """A Hugging Face folder with a tokenizer of letters. scale: of the weights."""
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
