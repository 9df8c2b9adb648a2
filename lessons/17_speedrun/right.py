"""Other right solutions of lesson 17, differently built: the check must pass them."""

import numpy as np

from lessons.checking import right_attempt

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@right_attempt("read_record")
def line_by_line(text):
    found = []
    for line in text.splitlines():
        if not line.startswith("step:"):
            continue
        parts = dict(part.split(":", 1) for part in line.split() if ":" in part)
        if "val_loss" in parts:
            milliseconds = int(parts["train_time"].removesuffix("ms"))
            found.append((int(parts["step"].partition("/")[0]), float(parts["val_loss"]), milliseconds / 1e3))
    return found


@right_attempt("tokens_to_target")
def by_interpolation(curve, target):
    for i in range(1, len(curve)):
        if curve[i][1] <= target:
            (a, above), (b, below) = curve[i - 1], curve[i]
            return float(np.interp(-target, [-above, -below], [a, b]))
    return None


@right_attempt("paired")
def with_arrays(changed, baseline):
    differences = np.subtract(changed, baseline)
    n = len(differences)
    half = T_975[n - 2] * differences.std(ddof=1) / np.sqrt(n)
    return float(differences.mean()), float(differences.mean() - half), float(differences.mean() + half)
