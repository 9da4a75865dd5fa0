"""Rewritten folders: their contents, and checks that reject a damaged or malicious one before it is used.

    config.json                 of the model, with "quantization_config": {"quant_method": "fhopt", "version": 1}
    model*.safetensors          its weights, unchanged
    plan/                       the plan, written by `LatentPlan.save`
    fhopt.json                  bytes and SHA-256 of all files that affect results, plan digest, hash of weights
    tokenizer files, generation_config.json, README.md

Everything is JSON, safetensors or text. The folder has no code, and nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from fhopt.errors import FhoptError, one_line
from fhopt.files import appearing, opened, read_file
from fhopt.models.model_files import MANIFEST as MANIFEST
from fhopt.models.model_files import PLAN as PLAN
from fhopt.models.model_files import is_part_of_model
from fhopt.parallel.offloaded_weights import named_weights
from fhopt.plan.fingerprint import shape_and_signs
from fhopt.plan.json_kinds import LARGEST
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.plan_files import PLAN_FILES

VERSION = 1
METHOD = "fhopt"  # in "quantization_config"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
FORBIDDEN = ("adapter_config.json",)  # would make transformers load another model from elsewhere
MAX_COUNT = 1 << 20  # of layers, heads, labels, experts in a configuration
REASON = 500  # characters of the reason in a message
_CHUNK = 1 << 22


@dataclass(frozen=True)
class RewrittenFolder:
    """A verified folder. config: its configuration as JSON. tensors: names of its weights."""

    path: Path
    plan: LatentPlan
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    tensors: frozenset[str]

    @property
    def weight_files(self) -> frozenset[str]:
        """Names of the weight files."""
        return _weight_files(self.manifest["files"])


def is_rewritten(path: Path) -> bool:
    """Return True if a folder has the manifest of a rewritten one, valid or not."""
    return (path / MANIFEST).is_file()


def read_folder(path: Path) -> RewrittenFolder:
    """Verify all bytes of the folder `path` and load its plan. Raises FhoptError for any difference."""
    manifest = _read_manifest(path)
    config = _read_config(path)
    files = manifest["files"]
    _check_files(path, files)
    tensors = _check_weights(path, _weight_files(files))
    plan = _read_plan(path)
    if plan.digest() != manifest["plan"]:
        raise damaged(path, "its plan is not the one it was written with")
    return RewrittenFolder(path, plan, config, manifest, tensors)


def save_again(plan: LatentPlan, place: Path) -> None:
    """Save a plan in place with a new provenance; in a rewritten folder, update the manifest too.

    Raises FhoptError for a rewritten folder that is damaged or has another plan.
    """
    itself = place.resolve()
    if not is_part_of_model(itself):
        plan.save(place)
        return
    path = itself.parent
    held = read_folder(path)
    if held.plan.digest() != plan.digest():
        raise FhoptError(f"{path} has another plan; expected the one it was rewritten with. Rewrite the model.")
    plan.save(itself)
    described = describe_files(path, [f"{PLAN}/{name}" for name in PLAN_FILES])
    manifest = {**held.manifest, "files": held.manifest["files"] | described}
    with appearing(path / MANIFEST) as file:
        file.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def damaged(path: Path, why: str) -> FhoptError:
    """Make the error for an unusable folder."""
    return FhoptError(
        f"{path} is damaged or was altered: {one_line(why, REASON)}; expected it as `fhopt rewrite` wrote it. "
        "Write or copy it again."
    )


# --------------------------------------------------------------------------------------------------- descriptions


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Load the JSON object in the folder's file `name`. Raises FhoptError."""
    try:
        value = json.loads(read_file(path / name))
    except FhoptError as error:
        raise damaged(path, str(error).partition(". ")[0]) from error
    except OSError as error:
        raise damaged(path, f"{name} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{name} is not JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise damaged(path, f"{name} holds a {type(value).__name__}; expected an object")
    return value


def _read_manifest(path: Path) -> dict[str, Any]:
    if not is_rewritten(path):
        raise FhoptError(
            f"{path} is not a rewritten folder: it has no {MANIFEST}. Write one with: fhopt rewrite MODEL "
            "--plan PLAN -o FOLDER."
        )
    manifest = read_json(path, MANIFEST)
    if manifest.get("version") != VERSION:
        raise FhoptError(
            f"{path} has version {one_line(manifest.get('version'), 20)}; expected {VERSION}. Rewrite the model."
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(v, dict) for v in files.values()):
        raise damaged(path, f"{MANIFEST} lists no files")
    required = {CONFIG, *(f"{PLAN}/{name}" for name in PLAN_FILES)}
    if missing := required - files.keys():
        raise damaged(path, f"{MANIFEST} does not list {min(missing)}")
    if not _weight_files(files):
        raise damaged(path, f"{MANIFEST} lists no weights")
    if not isinstance(manifest.get("plan"), str) or not isinstance(manifest.get("weights"), str):
        raise damaged(path, f"{MANIFEST} has no digests")
    return manifest


def _weight_files(files: Iterable[str]) -> frozenset[str]:
    return frozenset(n for n in files if n.endswith(".safetensors") and "/" not in n)


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path, CONFIG)
    method = config.get("quantization_config")
    if not isinstance(method, dict) or method.get("quant_method") != METHOD or method.get("version") != VERSION:
        raise damaged(path, f"{CONFIG} does not name the method {METHOD!r}, version {VERSION}")
    if "auto_map" in config:
        raise damaged(path, f"{CONFIG} asks for custom code (auto_map), which fhopt never runs")
    if "transformers_weights" in config:
        raise damaged(path, f"{CONFIG} names other weights (transformers_weights)")
    for name, value in _counts(config):
        if value > MAX_COUNT:
            raise damaged(path, f"{CONFIG} has {name} {value:.3g}; expected at most {MAX_COUNT:,}")
    for name in FORBIDDEN:
        if (path / name).exists():
            raise damaged(path, f"it contains {name}, which makes transformers load another model")
    return config


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the counts (layers, labels, ...) in a configuration: transformers makes lists of these lengths."""
    inner: list[Any] = [config]
    while inner:
        value = inner.pop()
        if isinstance(value, dict):
            inner += value.values()
            counts = {n: v for n, v in value.items() if n.startswith(("num_", "n_")) and "position" not in n}
            yield from ((n, float(min(v, LARGEST))) for n, v in counts.items() if isinstance(v, (int, float)))
        elif isinstance(value, list):
            inner += value


# --------------------------------------------------------------------------------------------------- bytes


def describe_files(path: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Compute size and SHA-256 of a folder's files, for the manifest."""
    ordered = sorted(names)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda name: _sha256(path / name), ordered))
    sizes = [(path / name).stat().st_size for name in ordered]
    return {n: {"bytes": s, "sha256": d} for n, s, d in zip(ordered, sizes, digests, strict=True)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with opened(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _check_files(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise FhoptError for a file outside the folder, missing, truncated or modified; compares sizes first.

    Follows symbolic links, which the Hub cache consists of.
    """
    for name, about in files.items():
        if not _is_plain(name):
            raise damaged(path, f"{MANIFEST} names {name[:60]!r}, which is not a file of this folder")
        try:
            size = (path / name).stat().st_size
        except (OSError, ValueError) as error:
            raise damaged(path, f"{name} is missing ({error})") from error
        if not (path / name).is_file() or size != about.get("bytes"):
            raise damaged(path, f"{name} has {size} bytes; expected {str(about.get('bytes'))[:20]}")
    try:
        present = describe_files(path, files)
    except OSError as error:
        raise damaged(path, f"{error.filename} cannot be read ({error.strerror})") from error
    for name, about in files.items():
        if present[name]["sha256"] != about.get("sha256"):
            raise damaged(path, f"the SHA-256 of {name} does not match")


def _is_plain(name: str) -> bool:
    """Return True for the name of a file in the folder itself or in its subfolder `plan`."""
    parts = PurePosixPath(name).parts
    is_simple = not any(c in name for c in "\\:\0") and ".." not in parts and "/".join(parts) == name
    return is_simple and (len(parts) == 1 or (len(parts) == 2 and parts[0] == PLAN))


def _check_weights(path: Path, names: frozenset[str]) -> frozenset[str]:
    """Return the names of all tensors. Raises FhoptError for invalid headers or a mismatched index."""
    from safetensors import SafetensorError, safe_open

    held: dict[str, str] = {}
    for name in sorted(names):
        try:
            with safe_open(path / name, "pt") as opened:
                keys = list(opened.keys())
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise damaged(path, f"{name} is not a safetensors file ({error})") from error
        if repeated := held.keys() & set(keys):
            raise damaged(path, f"{min(repeated)[:60]!r} is in two files")
        held |= dict.fromkeys(keys, name)
    _check_index(path, held, names)
    return frozenset(held)


def _check_index(path: Path, held: Mapping[str, str], names: frozenset[str]) -> None:
    if not (path / INDEX).exists():
        if names != {ONE_FILE}:
            raise damaged(path, f"there is neither {INDEX} nor {ONE_FILE} alone")
        return
    if (path / ONE_FILE).exists():
        raise damaged(path, f"{INDEX} and {ONE_FILE} are mutually exclusive")
    listed = read_json(path, INDEX)
    if not isinstance(listed.get("metadata"), dict) or not isinstance(listed.get("weight_map"), dict):
        raise damaged(path, f"{INDEX} has no weight_map and metadata")
    if listed["weight_map"] != held:
        wrong = next((k for k, v in listed["weight_map"].items() if held.get(k) != v), "") or min(
            held.keys() - listed["weight_map"].keys()
        )
        raise damaged(path, f"{INDEX} says {str(listed['weight_map'].get(wrong))[:60]!r} of {wrong[:60]!r}")


# --------------------------------------------------------------------------------------------------- plan


def _read_plan(path: Path) -> LatentPlan:
    """Load the plan with the checks of `LatentPlan.load`, and check its bases' dtype, which can be forged."""
    try:
        plan = LatentPlan.load(path / PLAN)
    except FhoptError as error:
        raise damaged(path, str(error).rstrip(".")) from error
    except Exception as error:  # a forged plan makes Python and torch raise many types
        raise damaged(path, f"its plan cannot be read ({type(error).__name__})") from error
    for site_plan in plan.sites:
        bases = (site_plan.key.encode, site_plan.key.decode, site_plan.value.encode, site_plan.value.decode)
        if not all(b.dtype == torch.float32 for b in bases):
            raise damaged(path, f"{site_plan.site.name} has bases that are not float32")
    return plan


# --------------------------------------------------------------------------------------------------- loaded weights


def weights_print(model: torch.nn.Module) -> str:
    """Hash all parameters of a model: names, shapes and sampled signs, which a dtype change preserves."""
    digest = hashlib.sha256()
    for name, weight in named_weights(model):
        digest.update(name.encode() + shape_and_signs(weight))
    return digest.hexdigest()


def check_weights(folder: RewrittenFolder, model: torch.nn.Module) -> None:
    """Raise FhoptError unless the model has the weights that the folder was written with, all finite.

    In float16 the smallest values of another dtype lose their sign: weights written in another dtype and loaded in
    float16 are only checked to be finite.
    """
    for name, weight in named_weights(model):
        if not bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))):
            raise damaged(folder.path, f"{name} has non-finite values")
    dtypes = {w.dtype for w in model.parameters()}
    if torch.float16 in dtypes and folder.manifest.get("dtype") != "float16":
        return
    if weights_print(model) != folder.manifest["weights"]:
        raise damaged(folder.path, "its weights are not those it was written with")
