"""What was measured of the sub-nets of a file, as records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ast_plugin.errors import StateError
from ast_plugin.profiles_text import render_profile
from ast_plugin.sub_nets import check_sub_net


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileRecord:
    """One sub-net in one form.

    Attributes:
        sub_net: Its name.
        form: How it is computed: ``dense``, ``sliced``, ``csr``, ``bsr`` or ``2:4``; where ``auto`` was asked for, what
            it chose.
        sparsity: Fraction of zeros among the prunable weights, in [0, 1].
        metrics: Metric name -> value, as saved with the file.
        latency_ms: Median time of a call, in milliseconds.
        p95_ms: Time that 95 % of the calls do not exceed, in milliseconds.
        memory_bytes: Bytes of its tensors; None if they cannot be seen.
        file_bytes: Size of its state dict as `torch.save` writes it; None if it has none.
        flops: Operations of a call, two a multiply-add; None if they cannot be counted.
    """

    sub_net: str
    form: str
    sparsity: float
    metrics: Mapping[str, float]
    latency_ms: float
    p95_ms: float
    memory_bytes: int | None = None
    file_bytes: int | None = None
    flops: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A form that a sub-net was not measured in.

    Attributes:
        sub_net: Its name.
        form: The form.
        reason: Why.
    """

    sub_net: str
    form: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """What `profile` measured.

    Attributes:
        records: One for each sub-net and form, in the order of the sub-nets.
        left_out: What could not be measured, and why.
        example_input: Shapes of the input, such as ``1 x 3 x 224 x 224``.
        runs: Timed calls of each.
        threads: Threads that torch used.
        elastic_bytes: Size of the elastic file, which holds all sub-nets; None if it is not at hand.
        versions: Package name -> version.
    """

    records: tuple[ProfileRecord, ...]
    left_out: tuple[LeftOut, ...] = ()
    example_input: str = ""
    runs: int = 0
    threads: int = 0
    elastic_bytes: int | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def sub_nets(self) -> tuple[str, ...]:
        """Names of the sub-nets that were measured, in order."""
        return tuple(dict.fromkeys(record.sub_net for record in self.records))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics, in order."""
        return tuple(dict.fromkeys(metric for record in self.records for metric in record.metrics))

    def fastest(self, sub_net: str) -> ProfileRecord:
        """Return the record of a sub-net in its fastest form.

        Args:
            sub_net: Its name.

        Raises:
            ConfigError: If it was not measured.
        """
        check_sub_net(sub_net, self.sub_nets)
        return min((record for record in self.records if record.sub_net == sub_net), key=lambda r: r.latency_ms)

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as plain containers, for JSON; `from_dict` takes them back."""
        values = dataclasses.asdict(self)
        values["records"] = [{**record, "metrics": dict(record["metrics"])} for record in values["records"]]
        return {**values, "left_out": list(values["left_out"]), "versions": dict(values["versions"])}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Profile:
        """Return the profile that `to_dict` described.

        Args:
            values: What `to_dict` returned.

        Raises:
            StateError: If something is missing, unknown or of another kind.
        """
        try:
            records = tuple(ProfileRecord(**record) for record in values["records"])
            left_out = tuple(LeftOut(**entry) for entry in values["left_out"])
            found = cls(**{**values, "records": records, "left_out": left_out})
            if not all(float(r.latency_ms) > 0 and isinstance(r.metrics, Mapping) and r.sub_net for r in records):
                raise ValueError("a latency is not above 0")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"this is no profile: {error}; give what Profile.to_dict() returned") from None
        return found

    def __str__(self) -> str:
        return render_profile(self)
