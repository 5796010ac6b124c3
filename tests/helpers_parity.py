"""Comparing a run with the record of a reference run, within the tolerances of tests/parity/README.md."""


def close(value, expected, relative, absolute, noise=0.0, floor=0.0):
    """`noise` is the relative float32 noise of the case; ten times it is allowed where that is more."""
    return abs(value - expected) <= max(absolute + relative * abs(expected), 10 * noise * max(abs(expected), floor))


def noise_of(result):
    """The float32 noise of the case; none where it was not measured."""
    none = {"metrics_rel": {}, **dict.fromkeys(("param_norm_rel", "param_sum_abs", "param_first_abs"), 0.0)}
    none |= dict.fromkeys(("loss_rel", "grad_norm_rel", "param_delta_norm_rel"), 0.0)
    measured = result.data["fp32_noise"] or {}
    return none | {name: value for name, value in measured.items() if value is not None}


def differing_steps(result, skip=()):
    """Of each step, what differs: (step, name, our value, the reference's). `skip` are (step, name) not compared."""
    noise = noise_of(result)
    found = []
    for line, expected in zip(result.lines, result.data["expected"]["steps"], strict=True):
        values = {
            "loss": (1e-4, 1e-5, noise["loss_rel"], 1e-2),
            "grad_norm": (1e-3, 1e-4, noise["grad_norm_rel"], 1e-3),
            "learning_rate": (1e-8, 0.0),
        }
        found += [
            (expected["step"], name, line[name], expected[name])
            for name, tolerance in values.items()
            if not close(line[name], expected[name], *tolerance)
        ]
        found += [
            (expected["step"], name, line.get(name), value)
            for name, value in expected["metrics"].items()
            if (expected["step"], name) not in skip
            and (
                name not in line or not close(line[name], value, 1e-3, 1e-4, noise["metrics_rel"].get(name, 0.0), 1e-2)
            )
        ]
    return found


def differing_parameters(result):
    """Of the trained weights, what differs: (parameter, what, our value, the reference's)."""
    parameters = dict(result.trainer.model.named_parameters())
    expectations = result.data["expected"]["final_params"]
    return differing_weights(parameters, result.start, expectations, noise_of(result))


def differing_weights(parameters, start, expectations, noise):
    """The same for any weights, by name."""
    found = []
    for name, expected in expectations.items():
        value = parameters[name].detach()
        delta = (value - start[name]).norm().item()
        first = value.flatten()[:4].tolist()
        checks = {
            "norm": (value.norm().item(), expected["norm"], 1e-5, 0.0, noise["param_norm_rel"]),
            "delta_norm": (delta, expected["delta_norm"], 1e-3, 1e-6, noise["param_delta_norm_rel"]),
            "sum": (value.sum().item(), expected["sum"], 0.0, max(1e-2, 10 * noise["param_sum_abs"])),
            **{
                f"first {i}": (a, b, 0.0, max(1e-5, 10 * noise["param_first_abs"]))
                for i, (a, b) in enumerate(zip(first, expected["first"], strict=True))
            },
        }
        found += [(name, what, *values[:2]) for what, values in checks.items() if not close(*values)]
    return found
