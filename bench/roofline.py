"""The roofline of Williams et al. 2009: operations per second over operations per byte."""



__all__ = ["draw"]

COLOURS = {"nbgrad": "#0072B2", "torch": "#D55E00", "torch channels-last": "#E69F00",
           "numpy": "#009E73"}                                # Okabe & Ito 2008


def draw(rows, path):
    """Write a PNG: every case as a dot for each side, below the ceilings of the newest run.

    False if there is nothing to draw: training steps are no single product of operands.
    """
    from matplotlib.figure import Figure

    limits = {row["case"]: max(float(row["flops"]), float(row["bytes"])) / float(row["median"])
              for row in rows if row["group"] == "machine"}
    cases = [row for row in rows if row["bound"] and float(row["bytes"])]
    if not cases or not {"copy", "fma float32"} <= set(limits):
        return False
    figure = Figure(figsize=(7.5, 5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for side in dict.fromkeys(row["side"] for row in cases):
        dots = [_dot(row) for row in cases if row["side"] == side]
        axes.loglog(*zip(*dots), "o", markersize=4, label=side, alpha=0.8, markeredgewidth=0,
                    color=COLOURS.get(side, "#555555"))
    copy, peak = limits["copy"] / 1e9, limits["fma float32"] / 1e9
    left, right = axes.get_xlim()
    ridge = peak / copy
    left, right = min(left, ridge / 2), max(right, 2 * ridge)
    axes.plot([left, ridge, right], [left * copy, peak, peak], color="#333333", linewidth=1)
    axes.set_xlim(left, right)
    axes.annotate(f"{copy:.0f} GB/s, {peak:.0f} GFLOP/s", (ridge, peak), (2, 4),
                  textcoords="offset points", fontsize="small")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("GFLOP/s")
    first = cases[0]
    axes.set_title(f"{first['group']}: {first['machine']}, {first['threads']} threads",
                   loc="left", fontsize="medium")
    axes.legend(fontsize="small", frameon=False)
    figure.savefig(path)
    return True


def _dot(row):
    flops = float(row["flops"])
    return flops / float(row["bytes"]), flops / float(row["median"]) / 1e9
