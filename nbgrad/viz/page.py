"""The laboratory's report as one HTML page that needs nothing else: no network, no server.

A content security policy forbids the page to load anything and to run anything but its own
script, which only sorts the table of claims. Every text from a study is escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources

from nbgrad.lab.results import Outcome
from nbgrad.lab.study import Figure, Table
from nbgrad.viz.outcomes import USUAL, again, authors, conditions, heading, machine, named, state
from nbgrad.viz.palette import STYLES
from nbgrad.viz.svg import legend, svg
from nbgrad.viz.tables import cell, figure_table, is_value

__all__ = ["INTERVALS", "TITLE", "VERDICTS", "html"]

TITLE = "What normalization does, measured"
INTERVALS = ("With 5 seeds the interval is the range of the values, which covers the true median "
             "with 94 %; all seeds share their test images, and learning rates are chosen by the "
             "accuracy on these: intervals are of seeds, not of images. Where a rule takes any of "
             "several comparisons, their intervals are wider (Bonferroni), so that 95 % would hold "
             "for all at once; of 5 to 10 seeds 87 to 94 % do. A run counts as diverged where its "
             "loss is not finite or ends above that of guessing, as that of one that learns "
             "nothing may. A curve is the median of the runs that have not diverged by then; "
             "where some have, its name says how many are left at its end.")
VERDICTS = ("Supported: these runs show the claim, by the study's rule. Not supported: they do not "
            "show it, which is not to say that they show its opposite. Depends: the parts of the "
            "rule disagree, or too few runs got far enough to be judged.")
_ORDER = ("supported", "depends", "not supported")      # of verdicts, when sorted


def html(outcomes: Sequence[Outcome]) -> str:
    """The page: claims and verdicts, then a section for each study, in the order given."""
    style, script = _style(), _asset("page.js")
    policy = (f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
              "base-uri 'none'; form-action 'none'")
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{TITLE}</title>\n<style>{style}</style>\n</head>\n<body>",
        '<a class="skip" href="#claims">Skip to the verdicts</a>',
        *_top(outcomes), *_claims(outcomes), "<main>",
        *(line for outcome in outcomes for line in _section(outcome)),
        "</main>", _foot(), f"<script>{script}</script>\n</body>\n</html>\n"])


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names what it lets through."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _style() -> str:
    """The style sheet with the palette's colours in it."""
    light, dark = ("\n".join(f"  --s{i}: {color};" for i, color in enumerate(colors, 1))
                   for colors in ([s.light for s in STYLES], [s.dark for s in STYLES]))
    classes = "\n".join(f".s{i} {{ --s: var(--s{i}); }}" for i in range(1, len(STYLES) + 1))
    sheet = _asset("page.css")
    for name, text in {"light": light, "dark": dark, "print": light, "classes": classes}.items():
        sheet = sheet.replace(f"{{{name}}}", text)
    return sheet


# --------------------------------------------------------------------------------- the first screen

def _top(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield f"<header>\n<h1>{TITLE}</h1>"
    yield f'<p class="soft">{escape(heading(outcomes))}</p>'
    found = {o.name: o for o in outcomes}
    usual = [(words, found[name]) for words, number in USUAL.items()
             if (name := named(number)) in found and name is not None]
    if usual:
        yield '<p class="soft lead" id="usual">What every article says about batch norm:</p>'
        yield '<ul class="usual" aria-labelledby="usual">'
        for words, outcome in usual:
            yield (f'<li><a href="#{_id(outcome)}">{escape(words)}</a>'
                   f"{_verdict(outcome)}</li>")
        yield "</ul>"
    yield "</header>"


def _claims(outcomes: Sequence[Outcome]) -> Iterator[str]:
    heads = (("#", "n"), ("Claim", ""), ("Verdict", "verdicts"), ("Source", "source"))
    yield '<table class="claims" id="claims">\n<thead><tr>'
    for i, (text, kind) in enumerate(heads):
        order = "ascending" if i == 0 else "none"
        yield (f'<th scope="col" class="{kind}" aria-sort="{order}">'
               f'<button type="button">{text}</button></th>')
    yield "</tr></thead>\n<tbody>"
    for i, outcome in enumerate(outcomes, 1):
        verdict = state(outcome)
        rank = _ORDER.index(verdict) if verdict in _ORDER else len(_ORDER)
        yield (f'<tr><td class="n">{i}</td><td><a href="#{_id(outcome)}">'
               f'{escape(outcome.study["claim"])}</a></td>'
               f'<td data-key="{rank} {escape(verdict)}">{_verdict(outcome)}</td>'
               f'<td class="source">{escape(authors(outcome.study["source"]))}</td></tr>')
    yield f'</tbody></table>\n<p class="soft">{escape(VERDICTS)}</p>'


def _verdict(outcome: Outcome) -> str:
    word = state(outcome)
    kind = word.replace(" ", "-") if word in _ORDER else "without"
    return f'<span class="verdict {kind}">{escape(word)}</span>'


def _id(outcome: Outcome) -> str:
    return "study-" + escape(outcome.name, quote=True)


# ---------------------------------------------------------------------------------------- a section

def _section(outcome: Outcome) -> Iterator[str]:
    study, finding, key = outcome.study, outcome.finding, _id(outcome)
    yield f'<section class="study" id="{key}" aria-labelledby="{key}-h">'
    yield (f'<div class="head"><h2 id="{key}-h">{escape(study["question"])}</h2>'
           f"{_verdict(outcome)}</div>")
    if finding is not None:
        yield f'<p class="answer">{escape(finding.sentence)}</p>'
    else:
        yield f'<p class="answer">{escape(conditions(outcome))}</p>'
    yield from _facts({"Claim": f'{study["claim"]} ({study["source"]})',
                       "Published": study["published"], "Set-up": study["setup"],
                       "Rule": study["rule"], "Changed": study.get("changed", "")})
    if finding is not None:
        if finding.figures:
            yield '<div class="figures">'
            for i, figure in enumerate(finding.figures, 1):
                yield from _figure(figure, f"{key}-{i}")
            yield "</div>"
        yield from _table(finding.table, f"Numbers: {study['question']}")
        if finding.notes:
            yield '<h3>Notes</h3>\n<ul class="notes">'
            yield from (f"<li>{escape(note)}</li>" for note in finding.notes)
            yield "</ul>"
    yield from _facts({"Others found": study.get("literature", "")})
    measured = ", ".join(f"<span>{escape(part)}</span>" for part in machine(outcome))
    yield (f'<p class="again">Run it again: <code>{escape(again(outcome))}</code>.<br>{measured}'
           f'{". " if measured else ""}<a class="top" href="#claims">All claims</a></p>'
           "\n</section>")


def _facts(facts: dict[str, str]) -> Iterator[str]:
    there = {name: text for name, text in facts.items() if text}
    if there:
        yield '<dl class="facts">' + "".join(
            f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in there.items()) + "</dl>"


def _figure(figure: Figure, key: str) -> Iterator[str]:
    yield f"<figure>\n<figcaption>{escape(figure.title)}</figcaption>"
    yield legend(figure)
    yield svg(figure, key)
    data = figure_table(figure)
    if len(data.rows) <= 200:               # longer ones are in the CSV files beside the page
        yield "<details><summary>The values</summary>"
        yield from _table(data, f"Values: {figure.title}")
        yield "</details>"
    yield "</figure>"


def _table(table: Table, name: str) -> Iterator[str]:
    """In a box that scrolls by itself, with the keyboard too, where a screen is too narrow."""
    right = [all(is_value(row[i]) for row in table.rows) for i in range(len(table.columns))]
    yield (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">'
           "<table><thead><tr>")
    yield from (f'<th scope="col"{_class(r, False)}>{escape(str(c))}</th>'
                for c, r in zip(table.columns, right))
    yield "</tr></thead><tbody>"
    for row in table.rows:
        yield "<tr>" + "".join(f"<td{_class(r, is_value(v))}>{escape(cell(v))}</td>"
                               for v, r in zip(row, right)) + "</tr>"
    yield "</tbody></table></div>"


def _class(right: bool, value: bool) -> str:
    words = " ".join(["n"] * right + ["value"] * value)
    return f' class="{words}"' if words else ""


def _foot() -> str:
    return ('<footer class="soft"><p>Bands and whiskers are the intervals that a figure or its '
           "study names, by bootstrap over seeds unless it says otherwise. A verdict follows from "
           "the study's rule, which was written before its results (where anything was changed "
           "after a first run, the study says so), and needs five seeds or more and the interval, "
           f"not the mean; runs that diverged count as results. {INTERVALS} Everything here was "
           "measured by "
           "<code>nbgrad lab run</code> and written by <code>nbgrad lab report</code>.</p>"
           "</footer>")
