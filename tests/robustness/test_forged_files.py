"""Plans, statistics and rewritten folders that were changed and re-signed: a FhoptError, or a working object.

test_fuzz_files.py tests damage that digests detect; test_hostile_files.py tests FIFOs, devices and pickles.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forged_files import HALF, changed, drawn_json, drawn_tensors, refused_or_used, sign_statistics, use
from hand_plans import CODED, in_segments, random_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interrupted_calibration import OPTIONS, sequences
from paged_plans import paged
from rewritten_folders import sign, sign_files, sign_plan
from safetensors.torch import load_file, save_file
from small_models import FittedModel
from torch import Tensor

import fhopt
from fhopt.calibration import run
from fhopt.calibration.data import CalibrationData
from fhopt.calibration.statistics_file import load_statistics, save_statistics
from fhopt.errors import FhoptError
from fhopt.files import read_tensors
from fhopt.hf.apply import latent_cache
from fhopt.models.model_facts import cache_argument
from fhopt.plan.cache_size import CacheLayer, record_of
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import BitGroup

SAVED = Path(__file__).parents[1] / "golden" / "saved" / "folder"
EXAMPLES = settings(
    deadline=None, max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
TRELLIS = (BitGroup(8, 8, 2 / 64), BitGroup(2, 8, -0.0225))
FORM = re.compile(r"[^\n]+; expected [^\n]+\. [A-Z][^\n]+\.$")


def rotated() -> LatentPlan:
    plan = replace(in_segments(random_plan("head", TRELLIS)), mean_tokens=12)
    layers = [CacheLayer("layers.0", numbers=48), CacheLayer("layers.1", "sliding", 64, numbers=48)]
    loss = dict(tokens=5, exact=2.0, plan=2.1, increase_percent=5.0, increase_percent_ci=[1.0, 9.0], kl=0.1)
    about: dict[str, Any] = {
        "model": "a/model", "texts": ["topics"], "tokens": 100, "sequences": 2, "context": 96, "seed": 0,
        "predicted_nats": 0.01, "expected_loss": {"nats": 0.01, "least": 0.0, "most": 0.1},
        "loss_checks": [{"text": "a", "predicted_nats": [0.1, 0.2], "nats": [0.1, 0.3]}],
        "quality": {"texts": {"topics": loss}, "tasks": {}},
    }  # fmt: skip
    return plan.with_provenance(**about, **record_of(layers))


PLANS: dict[str, Callable[[], LatentPlan]] = {
    "coded": lambda: random_plan("head", CODED, window_bits=8),
    "rotated": rotated,
    "shared": lambda: random_plan("input", CODED),
    "uncoded": lambda: random_plan("head"),
    "paged": lambda: paged(random_plan("head", CODED), fill=True, lift=1.5),
}


def forge_plan(folder: Path, described: Any, tensors: dict[str, Tensor] | None = None) -> Path:
    """Write a description and changed tensors, with correct digests if the description still has any."""
    (folder / "plan.json").write_text(json.dumps(described))
    if tensors is not None:
        save_file(tensors, folder / "plan.safetensors")
    try:
        sign_plan(folder)
    except (ValueError, LookupError, TypeError, AttributeError):  # it no longer has a digest
        assert isinstance(described, (dict, list))
    return folder


# --------------------------------------------------------------------------------------------------- known cases


FIELDS_OF_PLANS: tuple[tuple[tuple[Any, ...], Any, str], ...] = (
    (("sites", 0, "key", 0, 2), -2 / 64, r"sites\.0\.key\.0\.2 is -0\.03125 for 8 bits"),
    (("sites", 0, "key", 1, 2), -0.4, r"sites\.0\.key\.1\.2 is -0\.4 for 4 bits"),
    (("sites", 0, "key", 1, 2), 0.0, r"sites\.0\.key\.1\.2 is 0 "),
    (("sites", 0, "value", 1, 2), 5e-324, r"sites\.0\.value\.1\.2 is 4\.94\S+ "),
    (("sites", 0, "value", 1, 2), 1e30, r"sites\.0\.value\.1\.2 is 1e\+30; "),
    (("sites", 0, "key", 1, 2), math.nan, r"sites\.0\.key\.1\.2 is nan; "),
    (("sites", 0, "key", 1, 1), 9, r"sites\.0\.key\.1\.1 is 9; "),
    (("sites", 0, "site", "scale"), -1, r"sites\.0\.site\.scale is -1; "),
    (("sites", 0, "site", "scale"), 0.0, r"sites\.0\.site\.scale is 0\.0; "),
    (("sites", 0, "site", "softcap"), 2.0**63, r"sites\.0\.site\.softcap is 9\.2\S+; "),
    (("sites", 0, "site", "softcap"), 5e-324, r"sites\.0\.site\.softcap is 5e-324; "),
    (("sites", 0, "site", "mask"), {"a": 1}, r"sites\.0\.site\.mask is \{'a': 1\}; "),
    (("sites", 0, "site", "mask"), "no mask", r"sites\.0\.site\.mask is 'no mask'; "),
    (("sites", 0, "site", "cache"), "none at all", r"sites\.0\.site\.cache is 'none at all'; "),
    (("sites", 0, "site", "name"), "a\nb", r"sites\.0\.site\.name is 'a\\nb'; "),
    (("sites", 0, "site", "projections"), {"k": [HALF]}, r"sites\.0\.site\.projections\.k\.0 is '\\udc80'; "),
    (("sites", 0, "site", "projections"), {HALF: ["k"]}, r"projections is '\\udc80'; "),
    (("sites", 0, "site", "rope", "angles", 0), 1e300, r"rope\.angles\.0 is 1e\+300; "),
    (("sites", 0, "site", "rope", "angles"), [0.5], r"rope\.angles has 1 values; expected 6"),
    (("sites", 0, "site", "rope", "offset"), 5, r"rope\.rotary_dim is 12 from channel 5; "),
    (("sites", 0, "site", "rope", "blocks"), 5, r"rope\.rotary_dim is 12 from channel 2; "),
    (("sinks",), 10**9, r"sinks is 1000000000; "),
    (("recent",), 10**9, r"recent is 1000000000; "),
    (("block",), 10**9, r"block is 1000000000; "),
    (("provenance", "cache_layers"), 5, r"provenance\.cache_layers is 5; "),
    (("provenance", "cache_layers"), [1], r"provenance\.cache_layers\.0 is 1; "),
    (("provenance", "cache_layers", 0, "window"), "64", r"cache_layers\.0\.window is '64'; "),
    (("provenance", "cache_layers", 0, "more"), 1, r"cache_layers\.0\.more is not a known field; "),
    (("provenance", "model"), HALF, r"provenance\.model is '\\udc80'; "),
    (("provenance", "note"), {"a": [HALF]}, r"provenance\.note\.a\.0 is '\\udc80'; "),
    (("provenance", "loss_checks", 0, "nats"), [], r"loss_checks\.0\.nats has 0 values; "),
)


@pytest.mark.parametrize(("path", "value", "reason"), FIELDS_OF_PLANS)
def test_a_field_of_a_plan_out_of_its_range_is_refused(
    path: tuple[Any, ...], value: Any, reason: str, tmp_path: Path
) -> None:
    plan = rotated()
    tiers = CODED if path[2:3] == ("key",) or path[2:3] == ("value",) else TRELLIS
    sites = tuple(replace(s, key=replace(s.key, tiers=tiers), value=replace(s.value, tiers=tiers)) for s in plan.sites)
    folder = replace(plan, sites=sites).save(tmp_path / "plan")
    described = json.loads((folder / "plan.json").read_text())
    forge_plan(folder, changed(described, path, value))
    with pytest.raises(FhoptError, match=reason) as caught:
        LatentPlan.load(folder)
    assert FORM.match(str(caught.value)) and str(folder) in str(caught.value), caught.value


TENSORS_OF_PLANS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "not a number": (lambda x: x * math.nan, "non-finite values"),
    "too large": (lambda x: x * 1e30, "non-finite values or values above"),
    "half precision": (lambda x: x.half(), r"torch\.float16; expected float32"),
    "integers": (lambda x: x.long(), r"torch\.int64; expected float32"),
    "no latent heads": (lambda x: x[:0], "have shapes"),
    "no channels": (lambda x: x[:, :0], "have shapes"),
    "flat": (lambda x: x.flatten(), "have shapes"),
}


@pytest.mark.parametrize("how", TENSORS_OF_PLANS)
def test_invalid_bases_are_refused(how: str, tmp_path: Path) -> None:
    change, reason = TENSORS_OF_PLANS[how]
    folder = random_plan("head", CODED).save(tmp_path / "plan")
    tensors = load_file(folder / "plan.safetensors")
    name = "layers.0.key.encode"
    described = json.loads((folder / "plan.json").read_text())
    forge_plan(folder, described, tensors | {name: change(tensors[name]).contiguous()})
    with pytest.raises(FhoptError, match=rf"plan is damaged: layers\.0\.key: bases .*{reason}") as caught:
        LatentPlan.load(folder)
    assert FORM.match(str(caught.value)), caught.value


@pytest.fixture(scope="module")
def statistics(llama: FittedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = dict(llama.model.named_parameters())
    measured = run.calibrate(
        CalibrationData(llama.captured, sequences(), weights, "tiny"),
        OPTIONS,
        layouts=("input", "band", "identity", "head"),
    )
    path = tmp_path_factory.mktemp("statistics") / "tiny.stats"
    save_statistics(measured, path)
    return path


SITE_NAME = "model.layers.0.self_attn"
FIELDS_OF_STATISTICS: tuple[tuple[tuple[Any, ...], Any, str], ...] = (
    (("options", "tokens"), {}, r"options\.tokens is \{\}; "),
    (("options", "tokens"), 0, r"options\.tokens is 0; "),
    (("options", "recent"), 10**9, r"options\.recent is 1000000000; "),
    (("options", "bits"), [7], r"options\.bits\.0 is 7; "),
    (("layouts", SITE_NAME, "band"), True, r"layouts\.\S+\.band is True; "),
    (("layouts", SITE_NAME, "band"), 1, r"layouts\.\S+\.band is 1; "),
    (("layouts", SITE_NAME), {}, r"layouts has 2 sites; "),
    (("layouts", "another"), {"band": 2}, r"layouts has 3 sites; "),
    (("levels",), [1, 2], r"levels is \[1, 2\]; "),
    (("sites",), [], r"sites has 0 names"),
    (("sites", 0, "mask"), {"a": 1}, r"sites\.0\.mask is \{'a': 1\}; "),
    (("sites", 0, "scale"), -1, r"sites\.0\.scale is -1; "),
    (("sites", 0, "softcap"), 2.0**63, r"sites\.0\.softcap is 9\.2\S+; "),
    (("sites", 0, "projections", "k"), [HALF], r"projections\.k\.0 is '\\udc80'; "),
    (("sites", 0, "key_dim"), (1 << 20) - 2, r"tensor \S+ is torch\.float32 of shape"),
    (("sites", 0, "more"), 1, r"sites\.0\.more is not a known field; "),
    (("provenance", "cache_layers"), {"a": 1}, r"provenance\.cache_layers is \{'a': 1\}; "),
    (("prints", "fingerprint"), None, r"prints\.fingerprint is None; "),
)


@pytest.mark.parametrize(("path", "value", "reason"), FIELDS_OF_STATISTICS)
def test_a_field_of_statistics_out_of_its_range_is_refused(
    path: tuple[Any, ...], value: Any, reason: str, statistics: Path, tmp_path: Path
) -> None:
    about, tensors = read_tensors(statistics)
    sign_statistics(tmp_path / "forged", changed(about, path, value), tensors)
    with pytest.raises(FhoptError, match=reason) as caught:
        load_statistics(tmp_path / "forged")
    assert FORM.match(str(caught.value)) and str(tmp_path / "forged") in str(caught.value), caught.value


TENSORS_OF_STATISTICS: tuple[tuple[str, Callable[[Tensor], Tensor], str], ...] = (
    ("key.moment", lambda x: x * math.nan, "non-finite values"),
    ("key.moment", lambda x: x[:, :1, :1], r"of shape \(1, 1, 1\); expected"),
    ("key.moment", lambda x: -x, "negative diagonal"),
    ("value.metric", lambda x: x.half(), r"is torch\.float16"),
    ("key.count", lambda x: -x, "expected a count from 0"),
    ("key.count", lambda x: x.double(), r"is torch\.float64"),
    ("band.0.encode", lambda x: x[:, :, :-1], "of shape"),
    ("band.1.decode", lambda x: x * math.inf, "non-finite values"),
    ("band.0.variance", lambda x: -x, "negative values"),
    ("band.0.variance", lambda x: x[:, :0], "has 0 channels"),
    ("band.key.tokens", lambda x: x - (1 << 40), "expected a count from 0"),
    ("band.key.2", lambda x: x.flatten(), "of shape"),
)


@pytest.mark.parametrize(("name", "change", "reason"), TENSORS_OF_STATISTICS)
def test_invalid_sums_and_bases_of_statistics_are_refused(
    name: str, change: Callable[[Tensor], Tensor], reason: str, statistics: Path, tmp_path: Path
) -> None:
    about, tensors = read_tensors(statistics)
    whole = f"{SITE_NAME}.{name}"
    sign_statistics(tmp_path / "forged", about, tensors | {whole: change(tensors[whole]).contiguous()})
    with pytest.raises(FhoptError, match=rf"tensor {re.escape(whole)} .*{reason}") as caught:
        load_statistics(tmp_path / "forged")
    assert FORM.match(str(caught.value)), caught.value


# --------------------------------------------------------------------------------------------------- drawn changes


@pytest.fixture(scope="module", params=PLANS)
def saved_plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = PLANS[request.param]().save(tmp_path_factory.mktemp("plans") / "plan")
    use(LatentPlan.load(folder))
    return folder


@EXAMPLES
@given(data=st.data())
def test_a_forged_plan_is_refused_or_works(saved_plan: Path, data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved_plan, folder)
    described, tensors = json.loads((folder / "plan.json").read_text()), None
    if data.draw(st.booleans(), label="tensors"):
        tensors = drawn_tensors(data.draw, load_file(folder / "plan.safetensors"))
    else:
        described = drawn_json(data.draw, described, "digest", "checksum", "tensors_sha256")
    forge_plan(folder, described, tensors)
    with refused_or_used():
        use(LatentPlan.load(folder))


@EXAMPLES
@given(data=st.data())
def test_forged_statistics_are_refused_or_work(statistics: Path, data: st.DataObject, tmp_path: Path) -> None:
    about, tensors = read_tensors(statistics)
    if data.draw(st.booleans(), label="tensors"):
        tensors = drawn_tensors(data.draw, tensors)
    else:
        about = drawn_json(data.draw, about, "digest")
    sign_statistics(tmp_path / "forged", about, tensors)
    with refused_or_used():
        measured = load_statistics(tmp_path / "forged")
        options = replace(measured.options, layout=data.draw(st.sampled_from(["auto", "head"]), label="layout"))
        use(run.plan_from_calibration(measured, options))


FILES = ("plan/plan.json", "fhopt.json", "config.json", "generation_config.json")


def load_and_run(folder: Path) -> None:
    model: Any = fhopt.load(folder)
    with torch.no_grad():
        cache = latent_cache(model)
        for ids in torch.arange(40).remainder(32)[None].split([35, 1, 4], 1):
            assert model(ids, **{cache_argument(model): cache}).logits.shape[:2] == ids.shape


@pytest.fixture(scope="module")
def saved_folder() -> Path:
    """A rewritten folder, whose kernels are built before any timing."""
    load_and_run(SAVED)
    return SAVED


def sign_folder(folder: Path, name: str) -> None:
    """Correct the digests if the changed files still have any; a changed manifest keeps its stated digests."""
    try:
        if name == "fhopt.json":
            sign_files(folder, json.loads((folder / name).read_text()))
        else:
            sign(folder)
    except (ValueError, LookupError, TypeError, AttributeError, OSError):  # it no longer has a digest
        assert name in FILES


@pytest.mark.slow
@EXAMPLES
@given(data=st.data())
def test_a_forged_rewritten_folder_is_refused_or_works(saved_folder: Path, data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved_folder, folder)
    name = data.draw(st.sampled_from([*FILES, "model.safetensors", "plan/plan.safetensors"]), label="file")
    if name in FILES:
        described = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(drawn_json(data.draw, described)))
    else:
        save_file(drawn_tensors(data.draw, load_file(folder / name)), folder / name, {"format": "pt"})
    sign_folder(folder, name)
    with refused_or_used():
        load_and_run(folder)
