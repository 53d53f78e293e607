"""How good a calibration is, and what it is made of, as tables."""

from __future__ import annotations

from jaxbench.calibrate import CalibrationRun
from jaxbench.report.ops import format_seconds
from jaxbench.report.tables import Table


def calibration_tables(found: CalibrationRun) -> list[Table]:
    """Returns the tables of `calibrate`."""
    return [_step_table(found), _law_table(found)]


def _step_table(found: CalibrationRun) -> Table:
    before, after = dict(found.errors.before.ratios), dict(found.errors.after.ratios)
    steps = {sample.name: sample.ops.step_s for sample in found.samples}
    rows = [
        (name, format_seconds(steps[name]), f"{before[name]:.2f}", f"{after[name]:.2f}")
        for name in after
    ]
    return Table(
        title="Steps that the fit did not see: predicted over measured",
        header=("candidate", "measured", "roofline", "calibrated"),
        rows=tuple(rows),
        notes=(
            f"{found.errors.describe()}.",
            f"The calibration kept is fitted on all {len(found.samples)} steps; "
            "`--calibrated` uses it.",
        ),
    )


def _law_table(found: CalibrationRun) -> Table:
    rows = [
        (
            law.op_class,
            str(law.num_samples),
            format_seconds(law.start_s),
            f"{1e-9 / law.flop_s:,.4g}" if law.flop_s else "-",
            f"{1e-9 / law.byte_s:,.4g}" if law.byte_s else "-",
        )
        for law in found.calibration.laws
    ]
    return Table(
        title="What an op of each class takes on this machine",
        header=("class", "ops", "each run", "+ FLOPs at G/s", "+ bytes at GB/s"),
        rows=tuple(rows),
    )
