"""Which device rates can be fed, and what would limit the others."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from labels.settings import Train
from train.costs import model_costs, peak_tflops

_DEVICES = ("A100", "H100", "B200")
_UTILISATION = 0.4


@dataclass(frozen=True)
class Rate:
    """`samples_per_s` of one device, and whose rate that is."""

    device: str
    samples_per_s: float


@dataclass(frozen=True)
class Verdict:
    """On one rate: what would limit it, or "none"; `share`: of the rate that could be fed, at most 1; `more`: what it would take."""

    device: str
    samples_per_s: float
    limit: str
    share: float
    more: str

    @property
    def line(self) -> str:
        wanted = f"{self.device}, {self.samples_per_s:,.0f} samples/s: "
        if self.limit == "none":
            return wanted + f"fed ({self.more})"
        return wanted + f"{self.limit} would limit it to {self.share:.0%} ({self.more})"


def device_rates(settings: Train, vocabulary: int, wanted: Sequence[float]) -> list[Rate]:
    """Rates to judge: those that were asked for, else what the configured model takes on usual GPUs, at two fifths of their peak."""
    if wanted:
        return [Rate("a device", rate) for rate in wanted]
    flops = model_costs(settings.model, vocabulary).flops
    name = settings.model.trunk
    return [Rate(f"{name} on {gpu} at {_UTILISATION:.0%} MFU", _UTILISATION * (peak_tflops(gpu) or 0) * 1e12 / flops) for gpu in _DEVICES]


def judge(rates: Sequence[Rate], fed: float, what: str, unit: str, of_one_sample: float) -> list[Verdict]:
    """One verdict a rate.

    Args:
        rates: of one device each.
        fed: samples/s that were measured.
        what: what limits them.
        unit: of what one sample costs, e.g. "cores".
        of_one_sample: how much of that a sample takes, in unit x seconds.
    """
    found = []
    for rate in rates:
        limit, more = "none" if fed >= rate.samples_per_s else what, f"it takes {rate.samples_per_s * of_one_sample:,.1f} {unit}"
        found.append(Verdict(rate.device, rate.samples_per_s, limit, min(1.0, fed / rate.samples_per_s), more))
    return found


def as_json(verdicts: Sequence[Verdict]) -> list[dict[str, str | float]]:
    return [asdict(verdict) for verdict in verdicts]
