"""The one table of tolerances. Each row has its reason; no test and no comparison uses another number."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """The largest difference that counts as equal.

    Attributes:
        value: in `unit`.
        unit: what the number measures.
        reason: why not smaller.
    """

    value: float
    unit: str
    reason: str


RELATIVE = "relative L2 difference"
POINTS = "difference of the metric"
ENTRIES = "entries that differ"

TOLERANCES: dict[str, Tolerance] = {
    "decision": Tolerance(0.0, ENTRIES, "decisions are computed by the same float64 code from equal weights"),
    "decision_from_data": Tolerance(
        0.02,
        "share of the removed channels or masked weights",
        "float32 gradients and activations differ by the order of summation; channels or weights whose importances are "
        "that near to each other change places",
    ),
    "macs": Tolerance(0.0, "multiply-accumulates", "both counts come from the same counter over integer shapes"),
    "integers": Tolerance(0.0, ENTRIES, "integers and steps are computed by the same code from equal weights"),
    "activation_step": Tolerance(
        1e-5,
        "largest relative difference",
        "thresholds are extremes of float32 activations, which differ by the order of summation in the layers before",
    ),
    "forward": Tolerance(
        1e-5, RELATIVE, "float32 convolutions sum in different orders; about 1e-7 a layer, growing with depth"
    ),
    "forward_quantized": Tolerance(
        0.03,
        RELATIVE,
        "a float32 difference of 1e-7 before rounding flips a few activations by one step of their 8-bit grid",
    ),
    "metric": Tolerance(
        0.01, POINTS, "after training in float32 runs diverge chaotically; one point of accuracy on the test set"
    ),
    "training_float64": Tolerance(
        1e-7, "largest difference of a parameter", "ten SGD steps in float64; summation order grows with each step"
    ),
    "gradient": Tolerance(1e-4, RELATIVE, "float32 sums over batch and space in different orders, forward and back"),
    "gradient_float64": Tolerance(1e-9, RELATIVE, "float64 sums in different orders"),
    "operation": Tolerance(1e-6, RELATIVE, "one float32 operation against NumPy in float64"),
    "operation_float64": Tolerance(1e-12, RELATIVE, "a few float64 operations against NumPy's, summed in other orders"),
    "finite_difference": Tolerance(1e-5, RELATIVE, "the error of a central difference in float64"),
    "sampling": Tolerance(4.0, "standard errors", "a statistic of random draws; four standard errors in 16,000 cases"),
    "removal": Tolerance(
        2e-5, RELATIVE, "removing channels equals zeroing them up to the order of summation over fewer channels"
    ),
    "removal_check": Tolerance(
        1e-3,
        "largest difference of an entry, as a share of it",
        "the same on a user's model of any depth, before it is trusted; a wrong removal is far above",
    ),
    "statistics": Tolerance(
        1e-6, RELATIVE, "BatchNorm statistics and optimizer slots of one step against NumPy, float32"
    ),
    "statistics_float64": Tolerance(1e-12, RELATIVE, "the same in float64"),
    "toolkit_float32": Tolerance(
        1e-4, RELATIVE, "another toolkit takes differences of large sums of importances in float32"
    ),
    "export_match": Tolerance(
        1e-3,
        RELATIVE,
        "the same tensor of an exported file and of the model: float32 sums in other orders over all layers before it; "
        "different tensors are far apart",
    ),
    "export": Tolerance(
        0.01,
        RELATIVE,
        "an exported file, run operator by operator, rounds where the simulated model does; float32 differences before "
        "a rounding flip a few integers by one",
    ),
    "export_runtime": Tolerance(
        0.05,
        RELATIVE,
        "runtimes fuse layers and keep products in integers up to the next grid, so that they round at other places: "
        "flips by one integer in each layer",
    ),
    "export_classes": Tolerance(
        0.05,
        RELATIVE,
        "the same of a trained classifier that keeps its classes: flips add up over fifty layers and more",
    ),
    "export_runtime_classes": Tolerance(
        0.2, RELATIVE, "the same; on a grid of 4 bits one integer is a fifteenth of the range"
    ),
    "export_agreement": Tolerance(0.01, "share of the samples", "a sample between two classes may go to the other one"),
    "fake_quant": Tolerance(0.0, ENTRIES, "division, rounding half to even and product are exact float32 operations"),
    "range_search": Tolerance(
        0.01,
        "relative excess of the loss that a search minimises",
        "a search over a histogram knows values to a bin's width and tries a few dozen ranges; its loss is flat there",
    ),
    "calibrated_range": Tolerance(
        0.15,
        "largest relative difference of a limit",
        "toolkits search over other histograms and candidates; near its minimum the loss says little about the range",
    ),
}


def tolerance(name: str) -> Tolerance:
    """The row of that name; KeyError when the table has none."""
    return TOLERANCES[name]
