"""The pages of the service, in a browser, against the service itself: what they show is what the API answers."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys as Press
from selenium.webdriver.support.ui import WebDriverWait

from pairdr.collection import open_collection
from pairdr.config import EncodeConfig, LexicalConfig, ModelConfig
from pairdr.encode import encode_corpus
from pairdr.encoder import DualEncoder
from pairdr.findings import Finding, read_audit, write_audit
from pairdr.lexical import index_words
from pairdr.store_config import ServeConfig

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("the pages are not tested: there is no Chromium with chromedriver", allow_module_level=True)

if TYPE_CHECKING:
    from selenium.webdriver.remote.webelement import WebElement

    from pairdr.serve.service import Service

SWITCHES = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1200,900"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
SECONDS = 20
KEY = "open-sesame"
QUESTION = "Which RIVER runs through kendal"
HOSTILE = {
    "_id": "hostile",
    "title": "<b>Zebra</b> <script>alert(1)</script>",
    "text": "</p><img src=x onerror=\"alert('zebra')\"><script>document.title='owned'</script>&lt;zebra&gt;",
    "metadata": {"<i>kind</i>": "<script>alert(2)</script>", "link": "javascript:alert(3)"},
}
LABELS = {"near_copy": "unlabelled", "unretrieved_positive": "positive"}
FINDINGS = [
    Finding(
        rank=rank,
        kind=kind,
        label=label,
        query_id=f"q{rank}",
        query=f"question {rank} <b>of</b> a giraffe",
        passage_id="hostile",
        passage=HOSTILE["text"],
        other_id="long",
        other="A giraffe is tall.",
        teacher_score=0.5,
        suggestion="Look at it.",
    )
    for rank, (kind, label) in enumerate([*LABELS.items()] * 2, start=1)
]
LONG = {"_id": "long", "title": "Giraffe", "text": "A giraffe is a tall animal. " * 200, "metadata": {}}


class Site(NamedTuple):
    """A service that runs."""

    url: str
    service: Service
    stop: Callable[[], None]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, toy: Path, tiny_model: Path, bare_model: Path) -> Path:
    """Return a work folder of two models, as `pairdr run` leaves it, over the towns and two odd passages."""
    import torch
    from sentence_transformers import SentenceTransformer

    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(toy, folder / "data")
    rows = [json.loads(line) for line in (toy / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row | {"metadata": {"kind": row["_id"].split("-")[1]}} for row in rows]
    rows += [{**rows[0], "_id": "copy"}, HOSTILE, LONG]
    (folder / "data" / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    other = SentenceTransformer(str(tiny_model), device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        for weights in other.parameters():
            weights.add_(0.1 * torch.randn_like(weights))
    other.save(str(folder / "other"), create_model_card=False)

    collection = open_collection(folder / "data")
    for name, start in (("pair", folder / "other"), ("start", tiny_model)):
        DualEncoder.load(ModelConfig(start=str(start))).save(folder / "models" / name, options={}, inputs={})
        encoder = DualEncoder.open(folder / "models" / name)
        encode_corpus(collection, encoder, EncodeConfig(), folder / "vectors" / name)
    index_words(collection, LexicalConfig(), folder / "bm25")
    facts = {"model": "models/pair", "vectors": "vectors/pair", "bm25": "bm25", "mode": "auto", "k": 100}
    (folder / "work.json").write_text(json.dumps(facts | {"weights": None}), encoding="utf-8")
    write_reranker(bare_model, folder / "reranker")
    return folder


def write_reranker(bare_model: Path, folder: Path) -> None:
    import torch
    from sentence_transformers import CrossEncoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        CrossEncoder(str(bare_model), num_labels=1, device="cpu").save_pretrained(str(folder))


@contextmanager
def serve(work: Path, *, keys: Sequence[str] = (), **parts: Any) -> Iterator[Site]:
    """Run the service on a free port, in a thread."""
    import uvicorn

    from pairdr.serve.app import create_app
    from pairdr.serve.guard import Keys
    from pairdr.serve.measuring import Meters
    from pairdr.serve.service import Service
    from pairdr.serve.shelf import Shelf

    meters = Meters()
    shelf = Shelf(work, ModelConfig(device="cpu"), reranker=str(work / "reranker"), clock=meters.clock)
    service = Service(shelf, ServeConfig(), meters)
    app = create_app(service, meters, Keys(keys), **parts)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)

    def stop() -> None:
        server.should_exit = True
        thread.join(SECONDS)

    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Site(f"http://127.0.0.1:{port}", service, stop)
    finally:
        stop()


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the open service writes: `feedback/` and `audit/`."""
    folder = tmp_path_factory.mktemp("labels")
    (folder / "audit").mkdir()
    write_audit(folder / "audit" / "audit.tsv", FINDINGS)
    return folder


@pytest.fixture
def audit(labels: Path) -> Path:
    """Return the audit's file, without a mark."""
    write_audit(labels / "audit" / "audit.tsv", FINDINGS)
    return labels / "audit" / "audit.tsv"


@pytest.fixture(scope="module")
def site(work: Path, labels: Path) -> Iterator[Site]:
    """Return a service that asks for feedback and has an audit."""
    from pairdr.serve.labels import Feedback, Review

    with serve(work, feedback=Feedback(labels / "feedback"), review=Review(labels / "audit")) as site:
        yield site


@pytest.fixture(scope="module")
def locked(work: Path) -> Iterator[Site]:
    """Return a service that asks for a key, and for nothing else."""
    with serve(work, keys=[KEY]) as site:
        yield site


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


class Browser:
    """A fresh tab.

    Attributes:
        refused: statuses that the test provokes, of which the browser writes into its log.
    """

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self.refused: set[int] = set()
        driver.switch_to.new_window("tab")

    def open(self, url: str) -> None:
        self.driver.get(url)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, holds: Callable[[], Any]) -> None:
        WebDriverWait(self.driver, SECONDS, poll_frequency=0.02).until(lambda _: holds())

    def wait_for(self, selector: str, *texts: str) -> None:
        """Wait until these, and no other, texts stand there."""
        expected = list(texts)
        try:
            self.wait(lambda: self.texts(selector) == expected)
        except Exception:
            assert self.texts(selector) == expected  # says what differs
            raise

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def focused(self) -> str:
        """Return the id of what has the focus; of a result, the passage's."""
        return self.run(
            "const at = document.activeElement; return at.id || at.querySelector('.foot > code')?.textContent"
        )

    def ask(self, question: str) -> None:
        self.find("#q").clear()
        self.find("#q").send_keys(question, Press.ENTER)

    def complaints(self) -> list[str]:
        """Return what stands in the browser's log and was not provoked."""
        expected = [f"the server responded with a status of {status} " for status in self.refused]
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        return [message for message in messages if not any(text in message for text in expected)]


@pytest.fixture
def browser(chromium: webdriver.Chrome) -> Iterator[Browser]:
    """Return a fresh tab, in whose log nothing may stand at the end."""
    first = chromium.current_window_handle
    browser = Browser(chromium)
    yield browser
    complaints = browser.complaints()
    for handle in chromium.window_handles:
        if handle != first:
            chromium.switch_to.window(handle)
            chromium.close()
    chromium.switch_to.window(first)
    assert complaints == []


def ask_api(site: Site, **parameters: Any) -> list[dict[str, Any]]:
    """Return the hits of the API itself."""
    with urllib.request.urlopen(f"{site.url}/search?{urlencode(parameters, doseq=True)}") as response:
        return json.load(response)["results"][0]["hits"]


def ids_of(hits: Sequence[dict[str, Any]]) -> list[str]:
    return [hit["id"] for hit in hits]


IDS = ".hit .foot > code"


def test_hits_are_those_of_the_api_with_the_words_of_the_question_marked(site: Site, browser: Browser) -> None:
    browser.open(site.url)
    browser.wait_for(".absent", "Ask something of 123 passages.")
    assert browser.focused() == "q"
    browser.ask(QUESTION)
    hits = ask_api(site, q=QUESTION)
    browser.wait_for(IDS, *ids_of(hits))
    assert browser.texts(".hit .rank") == [str(rank) for rank in range(1, 11)]
    assert browser.texts(".hit h3") == [hit["title"] for hit in hits]
    assert browser.texts(".hit .passage") == [hit["text"] for hit in hits]
    assert [float(text) for text in browser.texts(".hit .score")] == pytest.approx([h["score"] for h in hits], rel=1e-3)
    expected = [
        word
        for hit in hits
        for word in re.findall(r"\w+", f"{hit['title']} {hit['text']}")
        if word.lower() in ("river", "runs", "through", "kendal")
    ]
    assert browser.texts("mark") == expected != []
    assert browser.texts("#status") == ["10 results"]
    assert browser.texts(".list h2") == ["pair"]
    version, mode, times = browser.texts(".facts span")
    assert re.fullmatch(r"version \d+-[0-9a-f]{12}", version)
    assert mode == "hybrid"
    assert re.fullmatch(r"[\d.]+ ms on the server, [\d.]+ ms round trip", times)


@pytest.mark.parametrize(
    ("question", "text", "marked"),
    [
        ("parse", "Parse: PARSE, parsed, parse_date, reparse.", ["Parse", "PARSE", "parse"]),
        ("what is the date of a b", "What is the Date of a b?", ["Date"]),
        ("ÜBER дату", "über u\u0308ber uber Дату дат", ["über", "u\u0308ber", "Дату"]),
        ("تحليل", "كيف تحليل التاريخ", ["تحليل"]),
        ("<mark> .* \\", "a <mark> .* \\", ["mark"]),
        ("3 11 𝕒𝕓", "3 11 𝕒𝕓", ["11", "𝕒𝕓"]),
        ("?", "what?", []),
    ],
)
def test_whole_words_that_say_something_are_marked(
    site: Site, browser: Browser, question: str, text: str, marked: list[str]
) -> None:
    browser.open(f"{site.url}/docs")
    script = """
        const [question, text, done] = arguments;
        import("/common.js").then(({ findWords, markWords }) => {
            const made = markWords(text, findWords(question));
            done([made.textContent, [...made.querySelectorAll("mark")].map((mark) => mark.textContent)]);
        });"""
    assert browser.driver.execute_async_script(script, question, text) == [text, marked]


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_a_switch_searches_anew(site: Site, browser: Browser, mode: str) -> None:
    browser.open(f"{site.url}/?q=market")
    browser.wait_for(IDS, *ids_of(ask_api(site, q="market")))
    browser.find(f"[value={mode}] + span").click()
    browser.wait_for(IDS, *ids_of(ask_api(site, q="market", mode=mode)))
    assert browser.texts(".facts span")[1] == {"bm25": "BM25"}.get(mode, mode)
    assert urlsplit(browser.driver.current_url).query == f"q=market&mode={mode}"


def test_reranking_filters_and_folding_reach_the_api(site: Site, browser: Browser) -> None:
    question = "The river of Ashford"
    browser.open(f"{site.url}/?{urlencode({'q': question})}")
    plain = ask_api(site, q=question)
    assert {"ashford-river", "copy"} <= set(ids_of(plain))
    browser.wait_for(IDS, *ids_of(plain))
    browser.find("[name=fold]").click()
    folded = ask_api(site, q=question, fold="true")
    browser.wait_for(IDS, *ids_of(folded))
    assert ids_of(folded) != ids_of(plain)
    browser.find(".hit .chip").click()
    kind = f"kind={folded[0]['metadata']['kind']}"
    filtered = ask_api(site, q=question, fold="true", filter=kind)
    browser.wait_for(IDS, *ids_of(filtered))
    assert browser.find("#filter").get_property("value") == kind
    browser.find("[name=rerank]").click()
    browser.wait(lambda: "reranked" in browser.texts(".facts span")[1])
    assert browser.texts(IDS) == ids_of(ask_api(site, q=question, fold="true", filter=kind, rerank="true"))


def test_two_models_stand_side_by_side_with_what_moved(site: Site, browser: Browser) -> None:
    browser.open(f"{site.url}/?q=school&mode=dense&k=12")
    browser.wait_for(".list h2", "pair")
    browser.find("[name=against] [value=start]").click()
    browser.wait_for(".list h2", "pair", "start")
    mine, other = (ids_of(ask_api(site, q="school", mode="dense", k=12, model=m)) for m in ("pair", "start"))
    assert browser.texts(IDS) == [*mine, *other]
    assert 0 < len({*mine} & {*other}) < 12

    def move(passage_id: str) -> str:
        if passage_id not in other:
            return "new"
        if passage_id not in mine:
            return "gone"
        up = other.index(passage_id) - mine.index(passage_id)
        return f"up {up}" if up > 0 else f"down {-up}" if up else "same place"

    assert browser.texts(".hit .move") == [move(passage_id) for passage_id in [*mine, *other]]
    assert browser.texts("#status") == [f"{len({*mine} & {*other})} of the first 12 in both lists"]
    tops = browser.run("return [...document.querySelectorAll('.list')].map((e) => e.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")


def test_a_copied_link_shows_the_same_in_a_fresh_window(site: Site, browser: Browser) -> None:
    everything = {"q": "a & b = river?", "k": 5, "mode": "dense", "model": "start", "against": "pair"}
    everything |= {"rerank": "true", "fold": "true"}
    query = urlencode([*everything.items(), ("filter", "kind=river"), ("filter", "kind=bridge")])
    browser.open(f"{site.url}/?{query}")
    browser.wait_for(".list h2", "start", "pair")
    browser.find("[name=k]").send_keys(Press.ARROW_UP, Press.TAB)  # 6 results
    browser.wait(lambda: len(browser.texts(IDS)) == 12)
    before = browser.texts(IDS)
    browser.driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"origin": site.url, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    browser.find("#copy-link").click()
    browser.wait_for("#status", "The link is copied.")
    link = browser.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert link == f"{site.url}/?{query.replace('k=5', 'k=6')}"
    browser.driver.switch_to.new_window("window")
    browser.open(link)
    browser.wait_for(IDS, *before)
    assert browser.find("#q").get_property("value") == everything["q"]
    assert browser.find("[name=k]").get_property("value") == "6"


def test_back_and_forward_go_through_searches(site: Site, browser: Browser) -> None:
    browser.open(f"{site.url}/?q=river&mode=bm25")
    found = {}
    for question in ("river", "museum", "bridge"):
        browser.ask(question)
        found[question] = ids_of(ask_api(site, q=question, mode="bm25"))
        browser.wait_for(IDS, *found[question])
    browser.driver.back()
    browser.wait_for(IDS, *found["museum"])
    browser.driver.back()
    browser.wait_for(IDS, *found["river"])
    assert browser.find("#q").get_property("value") == "river"
    browser.driver.forward()
    browser.wait_for(IDS, *found["museum"])


def test_what_a_server_does_not_offer_is_said(locked: Site, site: Site, browser: Browser) -> None:
    browser.open(f"{site.url}/?q=river&model=gone&k=5000&mode=fuzzy")
    browser.wait_for(".list h2", "pair")
    assert browser.texts("#notice") == ["Not to be had here: k=5000, mode=fuzzy, model=gone."]
    browser.ask("market")
    browser.wait(lambda: not browser.find("#notice").is_displayed())
    assert urlsplit(browser.driver.current_url).query == "q=market&k=100"


def test_a_hostile_passage_is_shown_literally(site: Site, browser: Browser) -> None:
    browser.open(f"{site.url}/?{urlencode({'q': 'zebra <b>onerror</b>', 'mode': 'bm25', 'k': 1, 'against': 'start'})}")
    browser.wait_for(IDS, "hostile", "hostile")
    assert browser.texts(".hit h3") == [HOSTILE["title"]] * 2
    assert browser.texts(".hit .passage") == [HOSTILE["text"]] * 2
    fields = [f"{field} {value}" for field, value in HOSTILE["metadata"].items()]
    assert browser.texts(".hit .chip") == fields * 2
    assert {text.lower() for text in browser.texts("mark")} == {"zebra", "onerror"}
    assert browser.run("return document.querySelectorAll('#results :is(script, img, b, i, a)').length") == 0
    assert browser.run("return document.scripts.length") == 1
    assert browser.driver.title == "zebra <b>onerror</b> – pairdr"


def test_a_long_passage_is_cut_until_it_is_asked_for(site: Site, browser: Browser) -> None:
    browser.open(f"{site.url}/?q=giraffe+river&mode=bm25&k=2")
    browser.wait(lambda: browser.texts(IDS)[:1] == ["long"])
    first, second = browser.driver.find_elements(By.CSS_SELECTOR, ".passage")
    line = float(first.value_of_css_property("line-height").removesuffix("px"))
    more = browser.find(".more")
    browser.wait(more.is_displayed)
    assert first.size["height"] == pytest.approx(8 * line, abs=1)
    more.click()
    assert first.size["height"] > 20 * line
    more.click()
    assert first.size["height"] == pytest.approx(8 * line, abs=1)
    assert second.find_element(By.XPATH, "following-sibling::button").is_displayed() is False


def test_nothing_found_is_said(site: Site, browser: Browser) -> None:
    browser.open(f"{site.url}/?q=river&filter=kind%3Dnone")
    browser.wait_for("#results .absent", "Nothing found. Fewer filters may find more.")
    assert browser.texts(IDS) == []


def test_a_refusal_shows_the_message_of_the_api(site: Site, browser: Browser) -> None:
    browser.refused.add(422)
    browser.open(f"{site.url}/?q=river&filter=colour%3Dred")
    browser.wait(lambda: "colour" in "".join(browser.texts("#problem")))
    assert browser.texts("#problem button") == []
    browser.find("#filter").clear()
    browser.ask("river")
    browser.wait_for(IDS, *ids_of(ask_api(site, q="river")))
    assert browser.texts("#problem") == [""]


def test_a_busy_server_is_asked_again(site: Site, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    from pairdr.serve.failures import ApiError

    async def refuse(form: Any) -> None:
        raise ApiError(429, "queue_full", "512 texts wait.", {"Retry-After": "1"})

    browser.refused.add(429)
    browser.open(site.url)
    browser.wait_for(".list h2")
    with monkeypatch.context() as patch:
        patch.setattr(site.service, "search", refuse)
        browser.ask("river")
        browser.wait_for("#problem p", "The server is busy. Try again in a moment.")
    browser.find("#problem button").click()
    browser.wait_for(IDS, *ids_of(ask_api(site, q="river")))
    assert browser.texts("#problem") == [""]


def test_a_server_that_is_gone_is_said(work: Path, browser: Browser) -> None:
    with serve(work) as site:
        browser.open(f"{site.url}/?q=river")
        browser.wait_for(".list h2", "pair")
        site.stop()
        browser.ask("market")
        browser.wait_for("#problem p", "The server cannot be reached.")
        assert browser.texts("#problem button") == ["Try again"]
        assert browser.texts(IDS) == []
    messages = browser.complaints()
    assert [message for message in messages if "ERR_CONNECTION_REFUSED" not in message] == []


def test_an_overtaken_search_is_given_up(site: Site, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    search, asked, given_up = site.service.search, threading.Event(), threading.Event()

    async def hold(form: Any) -> Any:
        if form.query != "slow":
            return await search(form)
        asked.set()
        while not given_up.is_set():
            await asyncio.sleep(0.01)
        return await search(form)

    monkeypatch.setattr(site.service, "search", hold)
    browser.open(site.url)
    browser.wait_for(".absent", "Ask something of 123 passages.")
    browser.ask("slow")
    assert asked.wait(SECONDS)
    browser.wait_for("#status", "Searching …")
    assert browser.find("#results").get_attribute("aria-busy") == "true"
    browser.ask("river")
    found = ids_of(ask_api(site, q="river"))
    browser.wait_for(IDS, *found)
    given_up.set()
    browser.ask("market")
    browser.wait_for(IDS, *ids_of(ask_api(site, q="market")))
    assert browser.find("#results").get_attribute("aria-busy") == "false"
    entries = browser.run("return performance.getEntriesByType('resource').filter((e) => e.name.endsWith('/search'))")
    assert [entry["responseStatus"] for entry in entries] == [0, 200, 200]


def test_a_key_is_asked_for_and_kept_for_the_tab(locked: Site, browser: Browser) -> None:
    browser.refused |= {401, 403}
    browser.open(f"{locked.url}/?q=river&mode=bm25")
    browser.wait_for("#problem p:first-child", "This server asks for a key.")
    assert browser.focused() == "key"
    browser.press("wrong", Press.ENTER)
    browser.wait(lambda: any("not one of" in text for text in browser.texts("#problem p:first-child")))
    browser.press(KEY, Press.ENTER)
    browser.wait(lambda: len(browser.texts(IDS)) == 10)
    assert browser.texts("#problem") == [""]
    browser.driver.refresh()
    browser.wait(lambda: len(browser.texts(IDS)) == 10)
    assert browser.run("return [localStorage.length, document.cookie, location.href.includes(arguments[0])]", KEY) == [
        *(0, "", False)
    ]
    browser.find("#forget-key").click()
    browser.wait_for("#problem p:first-child", "This server asks for a key.")
    assert browser.run("return sessionStorage.length") == 0


def test_thumbs_are_written_and_taken_back(site: Site, labels: Path, browser: Browser) -> None:
    browser.open(f"{site.url}/?q=river&mode=bm25&against=start")
    browser.wait(lambda: len(browser.texts(IDS)) == 20)
    passage_id = browser.texts(IDS)[0]

    def read() -> list[str]:
        lines = (labels / "feedback" / "qrels" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
        return ["\t".join(line.split("\t")[1:]) for line in lines]

    up, down, *_ = browser.driver.find_elements(By.CSS_SELECTOR, ".hit .vote")
    for button, noted, written, pressed in (
        (up, "relevant", [f"{passage_id}\t1"], ["true", "false"]),
        (down, "not relevant", [f"{passage_id}\t0"], ["false", "true"]),
        (down, "no judgement", [], ["false", "false"]),
    ):
        button.click()
        browser.wait_for("#status", f"Noted: {noted}.")
        assert read() == written
        for column in browser.driver.find_elements(By.CSS_SELECTOR, ".hits"):
            votes = column.find_elements(By.CSS_SELECTOR, ".hit:first-child .vote")
            assert [vote.get_attribute("aria-pressed") for vote in votes] == pressed


def test_a_second_click_on_a_thumb_takes_back_what_the_first_said(
    site: Site, labels: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first one's request takes longer than that of the second."""
    from pairdr.serve.labels import Feedback

    label, arrived, asked = Feedback.label, threading.Event(), []

    def label_late(self: Feedback, query: str, passage_id: str, relevant: bool | None) -> int:
        asked.append(relevant)
        if len(asked) == 1:
            arrived.wait(1.0)  # until the second one overtakes it, if it does
        count = label(self, query, passage_id, relevant)
        arrived.set()
        return count

    monkeypatch.setattr(Feedback, "label", label_late)
    browser.open(f"{site.url}/?q=museum&mode=bm25")
    browser.wait(lambda: browser.texts(IDS))
    browser.run("const thumb = document.querySelector('.vote'); thumb.click(); thumb.click()")
    browser.wait_for("#status", "Noted: no judgement.")
    browser.wait(lambda: len(asked) == 2)
    assert asked == [True, None]
    lines = (labels / "feedback" / "qrels" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    assert not [line for line in lines if browser.texts(IDS)[0] in line]
    assert browser.find(".vote").get_attribute("aria-pressed") == "false"


def test_colours_follow_the_system(site: Site, browser: Browser) -> None:
    script = "const style = getComputedStyle(arguments[0]); return [style.backgroundColor, style.color]"
    for path, ready in (("/?q=river", ".hit"), ("/review", ".row"), ("/docs", ".call")):
        browser.open(site.url + path)
        browser.wait(lambda ready=ready: browser.texts(ready))
        found = {}
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            found[scheme] = [sum_colour(colour) for colour in browser.run(script, browser.find("body"))]
        (light, dark_text), (dark, light_text) = found["light"], found["dark"]
        assert light > 600 > 300 > dark_text, path
        assert light_text > 450 > 300 > dark, path
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def sum_colour(colour: str) -> int:
    """Return the sum of red, green and blue of a colour, without which it would be see-through."""
    parts = [float(part) for part in re.findall(r"[\d.]+", colour)]
    assert colour.startswith("rgb") and (len(parts) == 3 or parts[3] == 1), colour
    return int(sum(parts[:3]))


def test_thumbs_and_review_are_shown_where_they_are_on(locked: Site, site: Site, browser: Browser) -> None:
    browser.refused.add(401)
    for shown, url in ((True, site.url), (False, locked.url)):
        browser.open(f"{url}/?q=river")
        browser.wait(lambda: browser.texts(IDS) or browser.texts("#problem p"))
        assert browser.find("#review-link").is_displayed() is shown
        assert bool(browser.texts(".vote")) is shown


def test_keys_move_through_the_results(site: Site, browser: Browser) -> None:
    browser.open(f"{site.url}/?q=river&against=start&k=3")
    browser.wait(lambda: len(browser.texts(IDS)) == 6)
    ids = browser.texts(IDS)
    steps = [
        *[("j", 0), ("j", 1), (Press.ARROW_DOWN, 2), ("j", 2), ("k", 1), (Press.ARROW_RIGHT, 4), (Press.ARROW_UP, 3)],
        *[(Press.ARROW_LEFT, 0), ("k", "q"), (Press.ARROW_DOWN, 0), ("/", "q"), ("j/?", "q")],
    ]
    for key, place in steps:
        browser.press(key)
        assert browser.focused() == (ids[place] if isinstance(place, int) else place), key
    assert browser.find("#q").get_property("value") == "j/?"  # the keys are letters there
    assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press(Press.ARROW_DOWN, "?")
    assert browser.find("#keys").is_displayed()
    browser.press("j")
    browser.press(Press.ESCAPE)
    browser.wait(lambda: not browser.find("#keys").is_displayed())
    assert browser.focused() == ids[0]


def test_a_phone_needs_no_sideways_scrolling(site: Site, browser: Browser) -> None:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for path, ready in (("/?q=zebra+river&against=start", ".hit"), ("/review", ".row"), ("/docs", ".call")):
        browser.open(site.url + path)
        browser.wait(lambda ready=ready: browser.texts(ready))
        assert browser.run("return document.documentElement.scrollWidth") == 390, path
        if ready == ".hit":
            lefts = browser.run("return [...document.querySelectorAll('.list')].map((e) => e.offsetLeft)")
            assert len(lefts) == 2
            assert lefts[0] == lefts[1]


def test_every_field_and_button_has_a_name(site: Site, browser: Browser) -> None:
    for path, ready in (("/?q=river&against=start", ".hit"), ("/review", ".row"), ("/docs", ".call")):
        browser.open(site.url + path)
        browser.wait(lambda ready=ready: browser.texts(ready))
        nodes = browser.driver.find_elements(By.CSS_SELECTOR, "input, select, textarea, button, progress, a, nav")
        unnamed = [
            node.get_attribute("outerHTML") for node in nodes if node.is_displayed() and not node.accessible_name
        ]
        assert unnamed == []


# --- the audit view ---------------------------------------------------------------------------------------------------


def test_findings_are_marked_one_after_the_other(site: Site, audit: Path, browser: Browser) -> None:
    def read() -> list[str]:
        return [finding.mark for finding in read_audit(audit)]

    browser.open(f"{site.url}/review")
    browser.wait_for("#query", "question 1 <b>of</b> a giraffe")
    assert browser.texts(".row .number") == ["1", "2", "3", "4"]
    assert browser.texts("#passage") == [HOSTILE["text"]]
    assert browser.texts("#other mark") == ["giraffe"]
    assert browser.texts("#numbers td") == ["teacher's score", "0.5000", ""]
    assert "judged so" in browser.texts("#marks p")[0]
    browser.press("r")
    browser.wait_for("#query", "question 2 <b>of</b> a giraffe")
    assert read() == ["relabel", "", "", ""]
    assert browser.texts("#marks p")[2] == "Use it neither way: the label goes."
    browser.press("n")
    browser.wait_for("#position", "3 of 4")
    browser.find("#marks div:nth-child(3) button").click()
    browser.wait_for("#position", "4 of 4")
    assert read() == ["relabel", "", "drop", ""]
    assert browser.texts("#marked") == ["2 of 4 findings marked"]
    browser.press("a")
    browser.wait_for("#position", "2 of 4")  # the one that was left out
    assert not browser.find("#done").is_displayed()
    browser.press("a")
    browser.wait_for("#marked", "4 of 4 findings marked")
    assert browser.find("#done").is_displayed()
    assert read() == ["relabel", "accept", "drop", "accept"]
    assert browser.texts(".row .tag") == read()
    browser.press("p")
    browser.wait_for("#position", "1 of 4")
    browser.press("u", "n", "u")  # faster than they are written
    browser.wait_for("#marked", "2 of 4 findings marked")
    browser.press("a")
    browser.wait_for("#marked", "3 of 4 findings marked")
    assert read() == ["", "accept", "drop", "accept"]
    browser.find("#filter [name=unmarked]").click()
    browser.wait_for(".row .number", "1")
    browser.find("[value=unretrieved_positive] + span").click()
    browser.wait_for(".row .number")
    assert browser.texts("#marked") == ["2 of 2 findings marked"]
    assert not browser.find("#finding").is_displayed()


def hold(browser: Browser, key: str, code: str, text: str) -> None:
    """Press a key and hold it, as long as it repeats a dozen times."""
    event = {"type": "keyDown", "key": key, "code": code, "text": text, "windowsVirtualKeyCode": ord(text.upper())}
    for number in range(12):
        browser.driver.execute_cdp_cmd("Input.dispatchKeyEvent", event | {"autoRepeat": number > 0})
    browser.driver.execute_cdp_cmd("Input.dispatchKeyEvent", event | {"type": "keyUp"})


@pytest.mark.parametrize("key", ["d", "Enter"])
def test_a_key_that_is_held_marks_once(site: Site, audit: Path, browser: Browser, key: str) -> None:
    browser.open(f"{site.url}/review")
    browser.wait_for("#position", "1 of 4")
    if key == "d":
        hold(browser, "d", "KeyD", "d")
    else:
        browser.run("document.querySelector('#marks div:nth-child(3) button').focus()")
        hold(browser, "Enter", "Enter", "\r")
    browser.wait_for("#position", "2 of 4")
    hold(browser, "n", "KeyN", "n")  # to go on is no mark
    browser.wait_for("#position", "4 of 4")
    assert [finding.mark for finding in read_audit(audit)] == ["drop", "", "", ""]


def test_marks_that_wait_for_one_that_fails_are_dropped(
    site: Site, audit: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were meant for findings that were not shown."""
    from pairdr.serve.failures import ApiError
    from pairdr.serve.labels import Review

    mark, asked, pressed = Review.mark, [], threading.Event()

    def mark_late(self: Review, query_id: str, passage_id: str, value: str) -> dict[str, Any]:
        asked.append((query_id, value))
        if len(asked) == 1:
            assert pressed.wait(SECONDS)
            raise ApiError(503, "later", "Not now.")
        return mark(self, query_id, passage_id, value)

    monkeypatch.setattr(Review, "mark", mark_late)
    browser.refused.add(503)
    browser.open(f"{site.url}/review")
    browser.wait_for("#position", "1 of 4")
    browser.press("a", "d", "r")
    pressed.set()
    browser.wait_for("#problem p", "Not now.")
    browser.find("#problem button").click()
    browser.wait_for("#position", "2 of 4")
    assert asked == [("q1", "accept")] * 2
    assert [finding.mark for finding in read_audit(audit)] == ["accept", "", "", ""]


def test_a_finding_that_is_gone_is_said(site: Site, audit: Path, browser: Browser) -> None:
    browser.refused.add(422)
    browser.open(f"{site.url}/review")
    browser.wait_for("#position", "1 of 4")
    write_audit(audit, FINDINGS[1:])
    browser.press("a")
    browser.wait(lambda: "no finding" in "".join(browser.texts("#problem")))
    assert browser.texts("#marked") == ["0 of 4 findings marked"]
    assert read_audit(audit) == FINDINGS[1:]


def test_without_an_audit_the_way_to_one_is_shown(locked: Site, browser: Browser) -> None:
    browser.open(f"{locked.url}/review")
    browser.wait(browser.find("#off").is_displayed)
    assert "--audit AUDIT" in browser.find("#off").text
    assert not browser.find("#audit").is_displayed()


# --- the API ----------------------------------------------------------------------------------------------------------


def test_the_api_is_listed_and_its_curl_lines_work(site: Site, browser: Browser) -> None:
    with urllib.request.urlopen(f"{site.url}/openapi.json") as response:
        paths = json.load(response)["paths"]
    browser.open(f"{site.url}/docs")
    browser.wait(lambda: browser.texts(".call"))
    calls = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    assert browser.texts(".call h2") == calls
    lines = dict(zip(calls, browser.texts(".call pre"), strict=True))
    for call in ("GET /search", "POST /search", "POST /v1/embeddings", "POST /v1/rerank", "GET /audit"):
        assert run_curl(lines[call]) == 200, lines[call]


def run_curl(line: str) -> int:
    """Ask what a line of curl asks."""
    words = shlex.split(line)[1:]
    options = dict(zip(words[:-1:2], words[1:-1:2], strict=True))
    assert set(options) <= {"-H", "-d"}
    headers = dict([options["-H"].split(": ")]) if "-H" in options else {}
    request = urllib.request.Request(words[-1], options["-d"].encode() if "-d" in options else None, headers)
    with urllib.request.urlopen(request) as response:
        return response.status
