"""Fit requests: size of the plan, page selection and calibration options, checked before anything runs.

Does not import torch, so that commands reject invalid options at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fhopt.calibration.options import DECIDED_BY_STATISTICS, FitOptions
from fhopt.errors import FhoptError, unknown_name
from fhopt.plan.site_plan import no_pages
from fhopt.refine import page_options
from fhopt.refine.options import Gate, read_loss
from fhopt.refine.page_options import PagingOptions

if TYPE_CHECKING:
    from fhopt.calibration.run import Calibration

DEFAULT_RATIO = 4.0
OPTIONS = {  # of `fhopt.fit`
    *FitOptions.__dataclass_fields__, "text", "batches", "statistics", "bytes_per_token", "max_loss", "gate_text",
    "pages", "mass",
} - {"texts"}  # fmt: skip
CALIBRATING = {"finding attention": 1.0, "moments": 4.0, "rates": 4.0, "losses": 3.0}  # stages, shares of the time


@dataclass(frozen=True)
class PlanRequest:
    """Requirements on a plan.

    options: of calibration and fitting; `options.ratio` is the size unless `bytes_per_token` or `gate` is set.
    bytes_per_token: size of the cache, everything included. gate: loss target; the smallest plan that meets it is
    fitted. pages: page selection. calibration: an existing one, loaded from a statistics file.
    """

    options: FitOptions
    bytes_per_token: float | None = None
    gate: Gate | None = None
    pages: PagingOptions | None = None
    calibration: Calibration | None = None

    @property
    def runs_model(self) -> bool:
        """Whether the language model is run even if there is a calibration."""
        return self.gate is not None or self.pages is not None

    @property
    def needs_model(self) -> bool:
        """Whether the model is run at all."""
        return self.calibration is None or self.runs_model


def read_request(
    *, ratio: float | Sequence[float] | None = None, bytes_per_token: float | None = None,
    max_loss: float | str | None = None, gate_texts: Sequence[str] = (), pages: float | str | None = None,
    mass: float | str | None = None, statistics: str | Path | None = None, options: Mapping[str, Any],
    given: Collection[str], has_texts: bool = True,
) -> PlanRequest:  # fmt: skip
    """Validate the options of `fhopt fit` and `fhopt.fit`, and return the request.

    max_loss: a share such as 0.01 or "1%". pages, mass: shares such as 0.125, "1/8" or "12.5%". statistics: file of
    `fhopt calibrate`. options: other fields of FitOptions. given: names of the options that the user set. has_texts:
    whether calibration uses texts, so that the number of sequences can be checked. Raises FhoptError.
    """
    ratios = [ratio] if isinstance(ratio, (int, float)) else list(ratio or ())
    gate = _read_size(ratios, bytes_per_token, max_loss, gate_texts, has_pages=pages is not None or mass is not None)
    chosen = dict(options) | {"ratio": ratios[0] if ratios else DEFAULT_RATIO}
    calibration = None
    if statistics is not None:
        calibration, decided = _read_statistics(Path(statistics), given)
        chosen |= decided
    fit_options = _options(chosen)
    fit_options.check() if has_texts else fit_options.check_sizes()
    fit_options, paged = _with_pages(fit_options, pages, mass)
    return PlanRequest(fit_options, bytes_per_token, gate, paged, calibration)


def _options(values: Mapping[str, Any]) -> FitOptions:
    """Build FitOptions. Raises FhoptError for unknown names."""
    for name in values:
        if name not in FitOptions.__dataclass_fields__:
            raise unknown_name(name, OPTIONS, "an option of a fit")
    return FitOptions(**values)


def _read_size(
    ratios: Sequence[float], bytes_per_token: float | None, max_loss: float | str | None, gate_texts: Sequence[str],
    *, has_pages: bool,
) -> Gate | None:  # fmt: skip
    """Return the loss target, or None. Raises FhoptError unless the options set exactly one size."""
    if len(ratios) > 1:
        raise FhoptError(
            f"--ratio was passed {len(ratios)} times; expected it once, since a plan has one ratio. To fit "
            "several plans from one calibration, use: fhopt plans fit MODEL "
            f"{' '.join(f'--ratio {ratio:g}' for ratio in ratios)}, or fhopt calibrate, and fhopt fit "
            "--statistics for each."
        )
    if bool(ratios) + (bytes_per_token is not None) + (max_loss is not None) > 1:
        raise FhoptError("ratio, bytes_per_token and max_loss are mutually exclusive. Set only one of them.")
    if max_loss is None:
        if gate_texts:
            raise FhoptError("gate_data requires max_loss. Set max_loss, such as 1%, or drop gate_data.")
        return None
    if has_pages:
        raise FhoptError(
            "max_loss excludes pages and mass, because it is measured without page selection. Find the ratio "
            "first, then fit with that ratio and pages, and measure the plan with: fhopt eval."
        )
    gate = Gate(read_loss(max_loss), tuple(gate_texts))
    gate.check()
    return gate


def _read_statistics(file: Path, given: Collection[str]) -> tuple[Calibration, dict[str, Any]]:
    """Load a statistics file; also returns the options that it fixes. Raises FhoptError."""
    conflicts = [name for name in DECIDED_BY_STATISTICS if name in given]
    if conflicts:
        option = "data" if conflicts[0] == "texts" else conflicts[0].replace("_", "-")
        raise FhoptError(
            f"--{option} and --statistics are mutually exclusive, because --{option} applies to calibration. "
            f"Calibrate again with: fhopt calibrate MODEL --{option} ... -o FILE."
        )
    from fhopt.calibration.statistics_file import load_statistics

    calibration = load_statistics(file)
    decided = {name: getattr(calibration.options, name) for name in DECIDED_BY_STATISTICS}
    if "tokens" not in given:
        decided["tokens"] = calibration.options.tokens
    return calibration, decided


def _with_pages(
    options: FitOptions, pages: float | str | None, mass: float | str | None
) -> tuple[FitOptions, PagingOptions | None]:
    """Return the options (without segments if pages are selected) and the page options. Raises FhoptError."""
    paged = page_options.read_options(pages, mass, options.texts)
    if paged is None:
        return options, None
    if options.segment is None:
        options = replace(options, segment=0)
    if options.segment_tokens:
        raise no_pages()
    paged.check(options.block, options.window.first_length)
    return options, paged
