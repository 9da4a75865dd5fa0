"""Commands in any order on one folder, with files damaged in between: done, or refused in one line.

A refused command leaves every file unchanged, and a successful one changes only its output. Generated text depends only
on the plan and the model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from command_models import call
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from text_models import save_text_model

from fhopt.cli.app import main
from fhopt.plan.plan_files import PLAN_FILES

SAMPLE = (
    "--data", "license", "--sequences", "3", "--rate-sequences", "1", "--context", "256", "--sinks", "4", "--recent",
    "16", "--tokens", "1024",
)  # fmt: skip
PROMPTS = ("tell me " * 20, "one two three four " * 8)  # longer than sinks and window
RATIOS = (1, 4, 8)
PLACES = ("plan", "other")
MODEL, STATISTICS, NEW, NOTES = "model", "statistics", "new", "notes"


@dataclass
class Place:
    """Files written to a path. ratio: of the plan in it. is_whole: not damaged since."""

    ratio: float | None = None
    is_whole: bool = True


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class CommandStates(RuleBasedStateMachine):
    """`places` are the files and folders of `folder`, by name."""

    origin: Path  # a model and its statistics
    texts: dict[tuple[str, float], str]  # generated, by prompt and ratio
    is_thorough: bool  # also run slow commands

    @initialize(ratio=st.sampled_from(RATIOS))
    def start(self, ratio: float) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=self.origin.parent))
        shutil.copytree(self.origin, self.folder, dirs_exist_ok=True)
        (self.folder / NOTES).write_text("mine")
        self.places = {MODEL: Place(), STATISTICS: Place(), NOTES: Place()}
        self.fit(ratio, PLACES[0])
        self.rewrite(PLACES[0], NEW)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def run(self, *arguments: Any, writes: str | None = None) -> Result:
        """Run a command that may write to one path, and only if it succeeds."""
        before = files_of(self.folder)
        store = {"FHOPT_CACHE_DIR": str(self.folder / "store")} if arguments[0] == "plans" else None
        result = CliRunner().invoke(main, [str(a) for a in arguments], env=store)
        after = files_of(self.folder)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code in (0, 2) and "Traceback" not in result.output, result.output
        if result.exit_code == 2:
            assert result.stderr.splitlines()[-1].startswith("fhopt: "), result.stderr
            assert result.stdout == "" and after == before
        else:
            kept = [{n: b for n, b in files.items() if n.partition("/")[0] != writes} for files in (before, after)]
            assert kept[0] == kept[1]
        return result

    def at(self, name: str) -> Path:
        return self.folder / name

    def is_whole(self, *names: str) -> bool:
        return all(name in self.places and self.places[name].is_whole for name in names)

    def expect(self, result: Result, *needs: str, fits: bool = True) -> bool:
        """Check the exit code; returns whether the command succeeded. needs: paths that it reads.

        A model has no checksum, so a damaged one may still load.
        """
        checked = [name for name in needs if name != MODEL]
        if not fits or not self.is_whole(*checked):
            assert result.exit_code == 2, result.output
        elif self.is_whole(*needs):
            assert result.exit_code == 0, result.output
        return result.exit_code == 0

    # ------------------------------------------------------------------------------------------- making plans

    @precondition(lambda self: self.is_thorough)
    @rule(out=st.sampled_from([STATISTICS, NOTES, MODEL]))
    def calibrate(self, out: str) -> None:
        result = self.run("calibrate", self.at(MODEL), *SAMPLE, "-o", self.at(out), writes=out)
        if out not in self.places or self.is_whole(out):  # calibrate replaces damaged statistics if it recognizes them
            self.expect(result, MODEL, fits=out not in (NOTES, MODEL))
        if result.exit_code == 0:
            self.places[out] = Place()
            self.forget_unless_known(out)

    def forget_unless_known(self, name: str) -> None:
        """Remove output made from a damaged model: it is valid, but its expected results are unknown."""
        if not self.is_whole(MODEL):
            self.remove(name)

    def remove(self, name: str) -> None:
        (shutil.rmtree if self.at(name).is_dir() else Path.unlink)(self.at(name))
        del self.places[name]

    @rule(ratio=st.sampled_from(RATIOS), out=st.sampled_from([*PLACES, NOTES, NEW, MODEL]))
    def fit(self, ratio: float, out: str) -> None:
        result = self.run("fit", "--statistics", self.at(STATISTICS), "--ratio", ratio, "-o", self.at(out), writes=out)
        fits = out not in self.places or self.holds_a_plan(out)
        if self.expect(result, STATISTICS, fits=fits):
            self.places[out] = Place(ratio)

    def holds_a_plan(self, name: str) -> bool:
        """Whether a folder contains only files of a plan, damaged or not."""
        return self.at(name).is_dir() and {p.name for p in self.at(name).iterdir()} <= set(PLAN_FILES)

    @rule(out=st.sampled_from(PLACES))
    def fit_what_cannot_be(self, out: str) -> None:
        result = self.run("fit", "--statistics", self.at(STATISTICS), "--ratio", 900, "-o", self.at(out), writes=out)
        assert result.exit_code == 2

    # ------------------------------------------------------------------------------------------- using plans

    @rule(prompt=st.sampled_from(PROMPTS), plan=st.sampled_from([None, *PLACES, STATISTICS]), as_json=st.booleans())
    def generate(self, prompt: str, plan: str | None, as_json: bool) -> None:
        arguments = () if plan is None else ("--plan", self.at(plan))
        needs = (MODEL,) if plan is None else (MODEL, plan)
        ratio = 1 if plan is None or plan not in self.places else self.places[plan].ratio
        self.say(prompt, ratio, as_json, MODEL, *arguments, needs=needs, fits=plan != STATISTICS)

    @rule(prompt=st.sampled_from(PROMPTS), is_exact=st.booleans(), as_json=st.booleans(), name=st.sampled_from([NEW]))
    def generate_with_a_rewritten_model(self, prompt: str, is_exact: bool, as_json: bool, name: str) -> None:
        ratio = 1 if is_exact or name not in self.places else self.places[name].ratio
        fits = name in self.places and self.places[name].ratio is not None
        self.say(prompt, ratio, as_json, name, *["--exact"] * is_exact, needs=(name,), fits=fits)

    def say(
        self, prompt: str, ratio: float | None, as_json: bool, name: str, *arguments: Any, needs: tuple[str, ...],
        fits: bool,
    ) -> None:  # fmt: skip
        """Generate twice, and compare the text with that of every other command with the same plan."""
        command = ("generate", self.at(name), prompt, "--max-new-tokens", 10, *arguments, *["--json"] * as_json)
        results = [self.run(*command) for _ in range(2)]
        done = [self.expect(result, *needs, fits=fits) for result in results]
        assert done[0] == done[1]
        if done[0]:
            texts = [json.loads(r.stdout)["text"] if as_json else r.stdout.removesuffix("\n") for r in results]
            assert texts[0] == texts[1]
            if self.is_whole(*needs):
                assert ratio is not None and texts[0].strip() == self.texts.setdefault(
                    (prompt, ratio), texts[0].strip()
                )

    @rule(plan=st.sampled_from(PLACES), is_recorded=st.booleans())
    def evaluate(self, plan: str, is_recorded: bool) -> None:
        options = ["--data", "license", "--context", 100, "--json", *["--record"] * is_recorded]
        result = self.run(
            "eval", self.at(MODEL), "--plan", self.at(plan), *options, writes=plan if is_recorded else None
        )
        if self.expect(result, MODEL, plan) and self.is_whole(MODEL):
            found = json.loads(result.stdout)["perplexity"]["license"]
            if self.places[plan].ratio == 1:
                assert found["plan"] == pytest.approx(found["exact"], rel=1e-4)

    @precondition(lambda self: self.is_thorough)
    @rule(plan=st.sampled_from(PLACES))
    def inspect(self, plan: str) -> None:
        self.expect(self.run("inspect", self.at(MODEL), "--plan", self.at(plan), "--json"), MODEL, plan)

    @rule(plan=st.sampled_from(PLACES), out=st.sampled_from([NEW, NEW, "plan", MODEL, NOTES]))
    def rewrite(self, plan: str, out: str) -> None:
        arguments = ("--plan", self.at(plan), "--no-measure", "--force", "-o", self.at(out))
        result = self.run("rewrite", self.at(MODEL), *arguments, writes=out)
        is_free = not self.at(out).exists() or (self.at(out).is_dir() and not [*self.at(out).iterdir()])
        fits = is_free or (out == NEW and (self.at(NEW) / "fhopt.json").exists())
        if result.exit_code == 0:
            assert self.is_whole(plan)
            self.places[out] = Place(self.places[plan].ratio)
            self.forget_unless_known(out)
        elif self.is_whole(MODEL, plan):
            assert not fits, result.output

    # ------------------------------------------------------------------------------------------- the store

    @rule(plan=st.sampled_from([*PLACES, MODEL]))
    def store(self, plan: str) -> None:
        result = self.run("plans", "add", self.at(plan), "--json", writes="store")
        if self.expect(result, plan, fits=plan != MODEL):
            (added,) = json.loads(result.stdout)["plans"]
            path = self.run("plans", "path", added["digest"][:12]).stdout.strip()
            assert path == added["path"]
            assert files_of(Path(path)).keys() == set(PLAN_FILES)
            self.places["store"] = Place()

    @rule(keep=st.sampled_from([None, 0, 1]), is_dry=st.booleans())
    def list_and_prune(self, keep: int | None, is_dry: bool) -> None:
        before = json.loads(self.run("plans", "--json").stdout)["plans"]
        options = [] if keep is None else ["--keep", keep]
        result = self.run("plans", "prune", *options, *["--dry-run"] * is_dry, "--json", writes="store")
        after = {e["name"] for e in json.loads(self.run("plans", "--json").stdout)["plans"]}
        gone = set() if is_dry else set(json.loads(result.stdout)["names"])
        assert after == {e["name"] for e in before} - gone
        if after and not is_dry:
            self.run("plans", "verify")

    # ------------------------------------------------------------------------------------------- damage

    @rule(data=st.data(), how=st.sampled_from(["deleted", "cut", "a bit turned", "gone"]))
    def damage(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from([n for n in sorted(self.places) if n != NOTES]))
        if how == "gone" and name != MODEL:
            self.remove(name)
            return
        files = [f for f in sorted(self.at(name).rglob("*")) if f.is_file()] or [self.at(name)]
        files = [f for f in files if self.decides(name, f)]
        if not files:
            return
        file = data.draw(st.sampled_from(files))
        content = file.read_bytes()
        if how in ("deleted", "gone"):
            file.unlink()
        elif how == "cut":
            file.write_bytes(content[: data.draw(st.integers(0, max(0, len(content) - 1)))])
        elif content:
            at = data.draw(st.integers(0, len(content) - 1))
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        if file == self.at(name) and not file.exists():
            del self.places[name]
        else:
            self.places[name].is_whole = False

    def decides(self, name: str, file: Path) -> bool:
        """Whether a file affects results and has a checksum, or belongs to a model."""
        if name != NEW:
            return True
        return file.suffix == ".safetensors" or file.name in ("config.json", "fhopt.json", "plan.json")

    @rule()
    def copy_the_original_again(self) -> None:
        for name in (MODEL, STATISTICS):
            if self.at(name).is_dir():
                shutil.rmtree(self.at(name))
            source = self.origin / name
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, self.at(name))
            self.places[name] = Place()


def run_states(origin: Path, examples: int, is_thorough: bool = False) -> None:
    machine: Any = type("Machine", (CommandStates,), {"origin": origin, "texts": {}, "is_thorough": is_thorough})
    machine.TestCase.settings = settings(
        max_examples=examples, stateful_step_count=10, deadline=None, suppress_health_check=[*HealthCheck]
    )
    machine.TestCase().runTest()


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its statistics."""
    folder: Path = tmp_path_factory.mktemp("commands") / "origin"
    save_text_model(folder / MODEL)
    made = call("calibrate", str(folder / MODEL), *SAMPLE, "-o", str(folder / STATISTICS))
    assert made.exit_code == 0, made.output
    return folder


@pytest.mark.hypothesis
@pytest.mark.usefixtures("without_compiling")
def test_commands_in_any_order_are_done_or_refused(origin: Path) -> None:
    run_states(origin, 8)


@pytest.mark.slow
@pytest.mark.hypothesis
@pytest.mark.usefixtures("without_compiling")
def test_so_are_slow_commands(origin: Path) -> None:
    run_states(origin, 25, is_thorough=True)
