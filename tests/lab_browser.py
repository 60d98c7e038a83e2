"""A headless browser for tests of the laboratory's page: fixtures, which a test module imports, and
which open the page that its own fixture ``written`` names."""

import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
# of each plot, how many marks have a size and a colour and lie inside
CONTENT = """plots => plots.map(plot => [...plot.querySelectorAll('.line, .bar, .dot')]
.filter(mark => {
  const box = mark.getBoundingClientRect(), paint = getComputedStyle(mark);
  return box.width + box.height > 1 && (paint.fill !== 'none' || paint.stroke !== 'none')
    && box.left >= plot.getBoundingClientRect().left - 2
    && box.right <= plot.getBoundingClientRect().right + 2;
}).length)"""


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no browser to open the page in: apt-get install chromium")
    with driver.sync_playwright() as p:
        one = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture
def visit(browser, written):
    """Open the page, or a file. What it complains about, asks for or pops up fails the test."""
    contexts, complaints = [], []

    def open_page(path=written, viewport=DESK, **settings):
        context = browser.new_context(viewport=viewport, **settings)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda m: complaints.append(m.text))
        tab.on("pageerror", lambda e: complaints.append(str(e)))
        tab.on("dialog", lambda d: (complaints.append(d.message), d.dismiss()))
        tab.on("request", lambda r: r.url != path.as_uri() and complaints.append(r.url))
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
