"""On-disk store of fitted plans: add, find, verify, prune.

    <cache folder>/plans/<model>-<ratio>x-<digest>/     one plan, as `LatentPlan.save` writes it
    <cache folder>/plans/.<request>.calibration...      checkpoints of an interrupted calibration

Plans are written atomically and their content never changes. The first letters of a name or of a digest identify a
plan. `fit_ratios` fits several sizes from one calibration and resumes after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fhopt.calibration.options import FitOptions
from fhopt.errors import FhoptError
from fhopt.files import check_writable, read_file
from fhopt.plan.plan_files import PLAN_FILES
from fhopt.progress import Progress, silent
from fhopt.system import cache_folder
from fhopt.version import __version__

if TYPE_CHECKING:  # plan names must resolve without importing torch
    from fhopt.calibration.run import Calibration
    from fhopt.models.loaded_model import LoadedModel
    from fhopt.plan.latent_plan import LatentPlan

LEFT_BEHIND = 24 * 3600.0  # seconds after which files of an interrupted command may be removed


def plans_folder() -> Path:
    """Return the folder of plans, inside the cache folder."""
    return cache_folder() / "plans"


@dataclass(frozen=True)
class StoredPlan:
    """One plan, as described in its plan.json. fault: why it cannot be used, "" if no reason is known.

    request: one or more results of `_request`, separated by spaces. ratio and bytes_per_token: the plan's own, at 8,192
    tokens. modified: seconds since 1970.
    """

    name: str
    path: Path
    model: str = ""
    fingerprint: str = ""
    digest: str = ""
    request: str = ""
    sites: int = 0
    ratio: float = 0.0
    nbytes: int = 0
    modified: float = 0.0
    fault: str = ""

    @property
    def requests(self) -> list[str]:
        """Hashes of the requests that the plan was fitted for; empty if it was not fitted for the store."""
        return self.request.split()


def stored_plans() -> list[StoredPlan]:
    """List all plans of the store by model and size, including damaged ones."""
    folder = plans_folder()
    paths = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")] if folder.is_dir() else []
    return sorted(map(_entry, paths), key=lambda e: (e.model, e.ratio, e.name))


def _entry(path: Path) -> StoredPlan:
    try:
        described = json.loads(read_file(path / "plan.json"))
        known = described["provenance"]
        match = re.search(r"-([0-9.]+)x-[0-9a-f]+$", path.name)
        return StoredPlan(
            name=path.name, path=path, model=str(known.get("model", "")), fingerprint=str(known.get("fingerprint", "")),
            digest=str(described["digest"]), request=str(known.get("request", "")), sites=len(described["sites"]),
            ratio=float(match[1]) if match else 0.0, nbytes=sum((path / n).stat().st_size for n in PLAN_FILES),
            modified=(path / "plan.json").stat().st_mtime,
        )  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, FhoptError) as error:
        return StoredPlan(path.name, path, fault=f"its description cannot be read ({type(error).__name__})")


def find_plan(name: str) -> StoredPlan:
    """Find the plan whose name or digest begins with `name`. Raises FhoptError unless exactly one matches."""
    known = stored_plans()
    matches = [e for e in known if e.name == name] or [
        e for e in known if name and (e.name.startswith(name) or e.digest.startswith(name))
    ]
    if len(matches) != 1:
        several = ", ".join(e.name for e in matches[:4])
        why = f"it matches {len(matches)} plans: {several}" if matches else f"it matches no plan among {len(known)}"
        raise FhoptError(f"{name!r} does not name one plan: {why}. List the plans with: fhopt plans.")
    return matches[0]


def add(plan: LatentPlan) -> StoredPlan:
    """Add a plan to the store; if it is there already, only add its request.

    Raises FhoptError if it cannot be written.
    """
    path = plans_folder() / _name(plan)
    known = _entry(path) if path.is_dir() else None
    request = str(plan.provenance.get("request", ""))
    if known is None or verify_plan(known).fault:
        plans_folder().parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # kernels may be stored there, too
        plan.save(path)
    elif request and request not in known.requests:
        from fhopt.plan.latent_plan import LatentPlan

        LatentPlan.load(path).with_provenance(request=" ".join([*known.requests, request])).save(path)
    return _entry(path)


def _name(plan: LatentPlan) -> str:
    model = re.sub(r"[^A-Za-z0-9._]+", "-", str(plan.provenance.get("model", ""))).strip("-.")[:60] or "model"
    return f"{model}-{plan.ratio():.2f}x-{plan.digest()[:12]}"


def stored_plans_table(plans: Iterable[StoredPlan]) -> Table:
    """Build a table with one row per plan."""
    rows = Table(title=f"Plans in {plans_folder()}", title_justify="left")
    for name, justify in (("name", "left"), ("model", "left"), ("sites", "right"), ("ratio", "right"), ("MB", "right")):
        rows.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    rows.add_column("fault", overflow="fold")
    for e in plans:
        rows.add_row(e.name, e.model, str(e.sites), f"{e.ratio:.2f}x", f"{e.nbytes / 1e6:.1f}", e.fault)
    return rows


# --------------------------------------------------------------------------------------------------- verify, prune


def verify_plan(entry: StoredPlan, model: LoadedModel | None = None) -> StoredPlan:
    """Load all bytes of a plan and return its entry, with any problem in `fault`.

    model: also report a plan that was fitted to another model.
    """
    if entry.fault:
        return entry

    from fhopt.plan.fingerprint import check_fingerprint
    from fhopt.plan.latent_plan import LatentPlan

    try:
        plan = LatentPlan.load(entry.path)
        if model is not None and model.module is not None:
            check_fingerprint(plan, dict(model.module.named_parameters()), model.name)
    except FhoptError as error:
        return replace(entry, fault=str(error))
    except Exception as error:  # a damaged file can raise anything
        return replace(entry, fault=f"it cannot be read ({type(error).__name__})")
    return entry


@dataclass(frozen=True)
class Pruned:
    """Names and total bytes of the plans and files that `prune` removed, or would remove."""

    names: tuple[str, ...]
    nbytes: int


def prune_plans(keep: int | None = None, dry: bool = False) -> Pruned:
    """Remove damaged plans, day-old files of interrupted commands, and all but the `keep` newest plans of each model.

    Never removes a folder that holds anything but files of a plan. dry: only report.
    """
    checked = [verify_plan(e) for e in stored_plans()]
    doomed = [e.path for e in checked if e.fault and _is_ours(e.path)]
    if keep is not None:
        doomed += _beyond(keep, [e for e in checked if not e.fault])
    doomed += _left_behind()
    nbytes = sum(map(_size, doomed))
    for path in [] if dry else doomed:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return Pruned(tuple(p.name for p in doomed), nbytes)


def _beyond(keep: int, sound: Sequence[StoredPlan]) -> list[Path]:
    newest = sorted(sound, key=lambda e: e.modified, reverse=True)
    by_model: dict[str, list[Path]] = {}
    for entry in newest:
        by_model.setdefault(entry.fingerprint, []).append(entry.path)
    return [path for paths in by_model.values() for path in paths[keep:]]


def _left_behind() -> list[Path]:
    folder, now = plans_folder(), time.time()
    hidden = folder.glob(".*") if folder.is_dir() else ()
    return [p for p in hidden if now - p.lstat().st_mtime > LEFT_BEHIND and (p.is_file() or _is_ours(p))]


def _is_ours(path: Path) -> bool:
    return not path.is_symlink() and {p.name for p in path.iterdir()} <= set(PLAN_FILES)


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


# --------------------------------------------------------------------------------------------------- fit


def fit_ratios(
    loaded: LoadedModel, options: FitOptions, ratios: Iterable[float], progress: Progress = silent
) -> list[StoredPlan]:
    """Fit plans of several ratios to one calibration and store them; skips those in the store.

    An interrupted calibration resumes. Raises FhoptError for invalid options.
    """
    from fhopt.models.rewritten_folder import weights_print
    from fhopt.planning.pipeline import fit_plan, text_source
    from fhopt.planning.request import PlanRequest

    wanted = list(dict.fromkeys(ratios))
    asked = {ratio: replace(options, ratio=ratio, checkpoint=None) for ratio in wanted}
    for one in asked.values():
        one.check()
    weights = weights_print(loaded.language_model())
    requests = {ratio: _request(one, weights) for ratio, one in asked.items()}
    known = {request: e for e in stored_plans() if e.requests and not verify_plan(e).fault for request in e.requests}
    missing = [ratio for ratio in wanted if requests[ratio] not in known]
    if missing:
        name = _request(replace(options, ratio=1.0), weights)  # independent of the ratios
        calibration = _calibrate(loaded, asked[max(missing)], name, progress)
        for ratio in missing:
            fitted = fit_plan(text_source(None), PlanRequest(asked[ratio], calibration=calibration))
            known[requests[ratio]] = add(fitted.plan.with_provenance(request=requests[ratio]))
    return [known[requests[ratio]] for ratio in wanted]


def _calibrate(loaded: LoadedModel, options: FitOptions, name: str, progress: Progress) -> Calibration:
    """Calibrate, with checkpoints in the folder of plans."""
    from fhopt.planning.pipeline import calibrate_source, text_source

    folder = plans_folder()
    check_writable(folder)
    options = replace(options, checkpoint=folder / f".{name}.calibration")
    return calibrate_source(text_source(loaded), options, progress)


def _request(options: FitOptions, weights: str) -> str:
    """Return a hash of everything that a fit depends on: equal requests give equal plans."""
    from fhopt.calibration.run import code_of

    about: dict[str, Any] = {k: v for k, v in asdict(options).items() if k != "checkpoint"}
    about["code"] = code_of(options, options.mean_tokens)
    text = json.dumps(about | {"weights": weights, "version": __version__}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
