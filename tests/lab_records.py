"""Synthetic records: for each study and each verdict, what every cell might have found."""


def curve(at, steps=range(25, 1501, 25), high=0.96):
    """A run that has 95 % at this step, or never (None)."""
    steps = list(steps)
    accuracy = [high if at is not None and s >= at else 0.5 for s in steps]
    percentiles = {f"p{p}": [float(p + (i % 2)) for i in range(len(steps))] for p in (15, 50, 85)}
    return {"steps": steps, "planned": steps[-1], "test_accuracy": accuracy, "diverged": at is None,
            "test_loss": [0.1] * len(steps), "final_accuracy": accuracy[-1],
            "steps_to": float(at or steps[-1] + 25), **percentiles}


def end(accuracy, **more):
    return {"final_accuracy": accuracy, "diverged": accuracy < 0.2, **more}


def jitter(cell):
    """Seeds differ, arms of one seed do not."""
    return 0.001 * cell["seed"]


def _convergence(plain, batch, plain_at_10=None):
    def record(cell):
        if cell["norm"] == "batch":
            return curve(batch)
        return curve(plain_at_10 if plain_at_10 and cell["lr"] == 10 else plain)
    return record


def _limits(**limits):
    """The highest learning rate with which each network learns, with and without."""
    def record(cell):
        limit = limits[cell["network"].split()[1]][cell["norm"] == "batch"]
        return end(0.95 if cell["lr"] <= limit else 0.1)
    return record


def _scales(**widths):
    """It learns from 1/width to width times the usual weights; (plain, batch) for each depth."""
    def record(cell):
        width = widths["deep" if cell["depth"] > 5 else "shallow"][cell["norm"] == "batch"]
        return end(0.95 if 1 / width <= cell["gain"] <= width else 0.1)
    return record


def _regularisation(batch, gap_of_4):
    def record(cell):
        test = 0.9 + jitter(cell) + (batch if cell["arm"] == "batch norm" else 0)
        gap = {"statistics of 4": gap_of_4}.get(cell["arm"], 0.05)
        return end(test, fit_accuracy=test + gap, fit_loss=0.01, test_loss=0.3)
    return record


def _placement(**after):
    def record(cell):
        gain = after.get(cell["activation"], 0) if cell["placement"] == "after" else 0
        return end(0.9 + jitter(cell) + gain)
    return record


def sizes(ghost, batch, group):
    """What each loses from the largest to the smallest size."""
    def record(cell):
        drop = ghost if cell["sweep"] == "ghost" else batch if cell["norm"] == "batch" else group
        return end(0.9 + jitter(cell) - (drop if cell["size"] == 2 else 0))
    return record


def _decays(same, gain):
    def record(cell):
        test = 0.9 + jitter(cell) + (gain if cell["decay"] == 0.99 else 0)
        return end(test, steps=[1, 2], test_accuracy=[0.5, test], test_loss=[1.0, 0.2],
                   train_loss=[1.0, 0.5 if same else cell["decay"]], fit_loss=0.1,
                   accuracies={"running": test, "population": test})
    return record


def _dropout(order, shift):
    """What dropout at the end is better by, and what statistics found again give back."""
    def record(cell):
        before = cell["arm"] == "before each norm"
        test = 0.9 + jitter(cell) - (order if before else 0)
        return end(test, population=test + (shift if before else 0), train_loss=0.1,
                   fit_accuracy=test)
    return record


def _cnn(**steps):
    def record(cell):
        lenet = cell["network"] == "LeNet-5"
        plain, batch = steps["lenet" if lenet else "cnn"]
        return curve(plain if cell["norm"] == "none" else batch, range(10, 401, 10))
    return record


def _trained(affine, others):
    def record(cell):
        accuracy = {"all parameters": 0.95, "gamma and beta": affine}.get(cell["arm"], others)
        accuracy += jitter(cell)
        return end(accuracy, steps=[1], test_accuracy=[accuracy], trained=352, off=0.1, classes=10)
    return record


def divisors(*worse, by=0.05):
    """At these scales of the weights, the variance ends so much lower."""
    def record(cell):
        low = cell["divisor"] == "variance" and cell["gain"] in worse
        return end(0.9 + jitter(cell) - (by if low else 0))
    return record


def _batches(small, large):
    """Batch norm's test loss over layer norm's, in small and in large batches."""
    def record(cell):
        ratio = 1 if cell["norm"] == "layer" else small if cell["size"] == 4 else large
        return end(0.95, loss=0.1 * ratio, steps=[1], test_loss=[0.1 * ratio])
    return record


def _renormed(batch, renorm):
    """Accuracies on batches of two classes; on random ones all have 95 %."""
    level = {("batch", "classes"): batch, ("renorm", "classes"): renorm}

    def record(cell):
        final = level.get((cell["arm"], cell["batches"]), 0.95) - 0.2 * (cell["lr"] != 0.03)
        return {"steps": [10, 20], "planned": 20, "test_accuracy": [final / 2, final],
                "train_accuracy": [0.9, 0.95], "final_accuracy": final,
                "population_accuracy": final, "diverged": False}
    return record


RECORDS = {
    "convergence-speed": {
        "supported": _convergence(1000, 200), "not supported": _convergence(200, 300),
        "depends": _convergence(200, 200, plain_at_10=1000)},
    "higher-learning-rates": {
        "supported": _limits(MLP=(1, 30), CNN=(0.03, 1)),
        "depends": _limits(MLP=(1, 1), CNN=(0.03, 1)),
        "not supported": _limits(MLP=(1, 1), CNN=(1, 0.3))},
    "initialisation": {
        "supported": _scales(shallow=(1, 10), deep=(1, 10)),
        "depends": _scales(shallow=(1, 10), deep=(3, 1)),
        "not supported": _scales(shallow=(3, 3), deep=(3, 1))},
    "regularisation": {
        "supported": _regularisation(0.02, 0.02), "depends": _regularisation(0.02, 0.05),
        "not supported": _regularisation(0, 0.06)},
    "placement": {
        "supported": _placement(sigmoid=-0.02, tanh=-0.02),
        "depends": _placement(sigmoid=-0.02, tanh=-0.02, relu=0.01),
        "not supported": _placement(relu=0.02)},
    "batch-size": {
        "supported": sizes(0.1, 0.2, 0.01), "depends": sizes(0.1, 0.01, 0.02),
        "not supported": sizes(0, 0, 0)},
    "momentum": {
        "supported": _decays(False, 0.02), "depends": _decays(True, 0.02),
        "not supported": _decays(True, 0)},
    "dropout": {
        "supported": _dropout(0.05, 0.04), "depends": _dropout(0.05, 0),
        "not supported": _dropout(0, 0)},
    "cnn": {
        "supported": _cnn(lenet=(200, 100), cnn=(300, 100)),
        "depends": _cnn(lenet=(100, 200), cnn=(300, 100)),
        "not supported": _cnn(lenet=(100, 100), cnn=(100, 200))},
    "gamma-beta-only": {
        "supported": _trained(0.8, 0.3), "depends": _trained(0.8, 0.9),
        "not supported": _trained(0.2, 0.3)},
    "divide-by-variance": {
        "supported": divisors(), "depends": divisors(10.0),
        "not supported": divisors(0.1, 1.0, 10.0)},
    "layer-norm-small-batch": {
        "supported": _batches(2.0, 1.0), "depends": _batches(2.0, 2.0),
        "not supported": _batches(0.9, 1.0)},
    "batch-renorm": {
        "supported": _renormed(0.60, 0.93), "depends": _renormed(0.60, 0.70),
        "not supported": _renormed(0.60, 0.55)},
}
