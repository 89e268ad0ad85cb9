"""The playground in a real browser: Chromium without a window, driven through its own driver."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from hugging_nano_gpt.convert.source import load_source
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH
from hugging_nano_gpt.sample.playground import HOST
from hugging_nano_gpt.sample.sampling import make_sampler
from hugging_nano_gpt.sample.streaming import stream_steps

from ..helpers.folders import DOCS_DIR
from ..helpers.samples import FACTS, sample
from ..helpers.serving import find_port

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed, which Gradio needs")
pytest.importorskip("gradio", reason="the extra playground is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

PROGRAM = Path(sys.executable).with_name("hugging-nano-gpt")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SWITCHES = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-extensions --no-default-browser-check""".split()
TIMEOUT_S = 90  # a busy machine has taken 20 s to start the server

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")

# The command line with texts of a million tokens for every request, and a file that exists while one is generated.
ENDLESS = """
import contextlib, pathlib, sys
import hugging_nano_gpt_cli
from hugging_nano_gpt.sample import page, streaming

class Sign(contextlib.AbstractContextManager):
    path, lock = pathlib.Path(sys.argv.pop(1)), streaming._DRAWING
    def __enter__(self):
        self.lock.acquire()
        self.path.touch()
    def __exit__(self, *_):
        self.path.unlink()
        self.lock.release()

streaming._DRAWING = Sign()
page.stream_steps = lambda *args, **kwargs: streaming.stream_steps(*args, **{**kwargs, "max_new_tokens": 1_000_000})
hugging_nano_gpt_cli.main()
"""


@contextmanager
def serve(*arguments, program=(PROGRAM,), **environment):
    """Runs the command on a free port; yields its process and the address of its page."""
    port = find_port()
    command = [*program, "playground", *arguments, "--port", str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment}, **pipes) as process:
        try:
            process.address = f"http://{HOST}:{port}"
            first_line = process.stdout.readline()
            assert first_line == f"The playground is at {process.address}; Ctrl-C ends it\n", process.stderr.read()
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def proxy():
    """A proxy for the server that records its clients; there should be none."""
    visits = []
    with socket.create_server((HOST, 0)) as listener:

        def note():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    visits.append(connection.recv(200))

        threading.Thread(target=note, daemon=True).start()
        yield f"http://{HOST}:{listener.getsockname()[1]}", visits
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def server(proxy):
    address, _ = proxy
    names = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    no_proxy = {"no_proxy": "", "NO_PROXY": ""}
    with serve(CKPT_PATH, "--meta", META_PATH, **dict.fromkeys(names, address), **no_proxy) as process:
        yield process.address


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_window_size(1280, 1000)
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, server):
    return Page(driver, server)


class Page:
    """The page as a person sees and uses it."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        wait(lambda: self.find("#generate"))

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def read(self, selector):
        return self.find(selector)[0].get_property("textContent")

    @property
    def text(self):
        return self.read("#text .text")

    @property
    def status(self):
        return self.read("#status").strip()

    def set(self, selector, value):
        (field,) = self.find(selector)
        field.send_keys("\ue009a\ue000", str(value), "\ue004")  # Control and a, the value, Tab

    def set_number(self, name, value):
        self.set(f"#{name} input[type=number]", value)

    def click(self, name):
        self.find(f"#{name}")[0].click()

    def generate(self, prompt, **settings):
        """Generates a text to its end; returns the different texts that were shown meanwhile."""
        self.set("#prompt textarea", prompt)
        for name, value in settings.items():
            self.set_number(name, value)
        self.click("generate")
        n_tokens = f"{settings['max_new_tokens']:,}"
        seen = []

        def is_done():
            seen.extend([self.text] if self.text not in seen[-1:] else [])
            return self.status.startswith(f"{n_tokens} of {n_tokens} tokens")

        wait(is_done, every_s=0.02)
        return [*seen, self.text]


def wait(condition, every_s=0.1):
    """Waits until a condition is true, and returns its value."""
    end = time.monotonic() + TIMEOUT_S
    while not (value := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(every_s)
    return value


def list_hosts(driver):
    """Lists the hosts that pages have contacted since the last call, with or without an answer."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    urls += [event["params"]["url"] for event in events if event["method"] == "Network.webSocketCreated"]
    # the browser's own pages, chrome:, use no network
    return {urlsplit(url).hostname for url in urls if urlsplit(url).scheme in ("http", "https", "ws", "wss")}


def test_text_is_streamed_and_is_that_of_the_command(page):
    command = [PROGRAM, "generate", CKPT_PATH, "ROMEO:", "--meta", META_PATH, "--num-samples", "1"]
    printed = subprocess.run([*command, "--max-new-tokens", "300"], capture_output=True, text=True, check=True).stdout
    seen = page.generate("ROMEO:", max_new_tokens=300)
    assert page.text == printed.removesuffix("\n---------------\n")
    assert len(page.text) == 306
    growing = [text for text in seen if "ROMEO:" in text]
    assert len({len(text) for text in growing}) > 2
    assert all(page.text.startswith(text) for text in growing)


def test_bars_show_what_could_have_been_sampled(page):
    page.generate("ROMEO:", max_new_tokens=30)
    sampler = make_sampler(load_source(CKPT_PATH, meta_path=META_PATH))
    *_, last = stream_steps(sampler, "ROMEO:", max_new_tokens=30)
    likeliest = last.probabilities.topk(10)
    shares = [element.text for element in page.find("#bars .share")]
    assert shares[:10] == [f"{100 * p:.2f}%" if p >= 5e-5 else "< 0.01%" for p in likeliest.values.tolist()]
    widths = [element.size["width"] for element in page.find("#bars .bar")]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[2]
    (drawn,) = page.find("#bars .token.drawn")
    assert drawn.text == {" ": "\u2423", "\n": "\\n"}.get(page.text[-1], page.text[-1])


def test_settings_are_those_of_the_command(page):
    settings = {"temperature": 1.3, "top_k": 4, "max_new_tokens": 60, "seed": 7}
    page.generate("KING", **settings)
    assert page.text == sample(CKPT_PATH, "KING", meta_path=META_PATH, **settings)
    assert len(page.find("#bars .share")) == 4
    page.generate("KING", **{**settings, "top_k": 1})
    assert page.text == sample(CKPT_PATH, "KING", meta_path=META_PATH, **{**settings, "top_k": 1, "seed": 8})
    assert [element.text for element in page.find("#bars .share")] == ["100.00%"]


def test_empty_prompt_is_a_newline(page):
    page.generate("", max_new_tokens=20)
    assert page.text == sample(CKPT_PATH, "\n", meta_path=META_PATH, max_new_tokens=20)


def test_facts_are_shown(page):
    names = [element.text for element in page.find("#facts dt")]
    assert dict(zip(names, [element.text for element in page.find("#facts dd")], strict=True)) == FACTS


def test_unknown_character_is_an_error_that_can_be_read(page):
    page.set("#prompt textarea", "caf\xe9 <b>")
    page.click("generate")
    expected = "prompt: expected characters of the model's 65, got '<', '>', '\xe9'; leave them out"
    wait(lambda: expected in page.read("body"))
    assert page.text == ""
    page.generate("ROMEO:", max_new_tokens=5)  # the page still works


def test_missing_seed_is_an_error_that_can_be_read(page):
    page.set("#seed input", "\ue017")
    page.click("generate")
    wait(lambda: "seed: expected a whole number" in page.read("body"))


def test_no_other_machine_is_contacted(page, proxy):
    page.generate("ROMEO:", max_new_tokens=20)
    assert list_hosts(page.driver) == {HOST}
    assert proxy[1] == []
    page.driver.execute_script("fetch('http://playground.invalid/').catch(() => 0)")  # the log records requests
    wait(lambda: "playground.invalid" in list_hosts(page.driver))


def test_screenshot_shows_the_page(page, tmp_path):
    """Makes docs/playground.png, with PLAYGROUND_PNG=docs/playground.png in the environment."""
    path = Path(os.environ.get("PLAYGROUND_PNG", tmp_path / "playground.png"))
    size = {"width": 1280, "height": 940}
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {**size, "deviceScaleFactor": 1, "mobile": False}
    )
    page.generate("ROMEO:", max_new_tokens=400)
    page.driver.execute_script("document.activeElement.blur()")
    page.driver.save_screenshot(str(path))
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    with Image.open(path) as image, Image.open(DOCS_DIR / "playground.png") as documented:
        assert image.size == documented.size == tuple(size.values())
        for picture in (image, documented):  # with the bar of the sampled token, and of different lengths
            colours = [colour for _, colour in picture.convert("RGB").getcolors(1 << 20)]
            assert (249, 115, 22) in colours
            assert len(colours) > 100
    assert (DOCS_DIR / "playground.png").stat().st_size < 200_000


def test_two_pages_at_once_get_the_texts_of_one_alone(page, server):
    settings = {"max_new_tokens": 200, "meta_path": META_PATH}
    first = page.driver.current_window_handle
    page.set_number("max_new_tokens", 200)
    page.driver.switch_to.new_window("tab")
    other = Page(page.driver, server)
    other.set_number("seed", 7)
    other.set_number("max_new_tokens", 200)
    page.driver.switch_to.window(first)
    page.click("generate")
    page.driver.switch_to.window(second := next(h for h in page.driver.window_handles if h != first))
    other.click("generate")
    for window, seed in ((first, 1337), (second, 7)):
        page.driver.switch_to.window(window)
        wait(lambda: page.status.startswith("200 of 200"))
        assert page.text == sample(CKPT_PATH, seed=seed, **settings)
    page.driver.close()
    page.driver.switch_to.window(first)


@pytest.fixture
def endless(tmp_path):
    """A server with endless texts: its address, and a function that returns whether it generates one."""
    sign = tmp_path / "drawing"
    with serve(program=[sys.executable, "-c", ENDLESS, sign]) as process:
        yield process.address, sign.exists


def test_stop_stops_the_model(driver, endless):
    address, is_drawing = endless
    page = Page(driver, address)
    page.click("generate")
    wait(lambda: len(page.text) > 600)  # beyond the 500 tokens that were asked for
    assert is_drawing()
    page.click("stop")
    wait(lambda: not is_drawing())
    time.sleep(0.5)
    text = page.text
    time.sleep(0.5)
    assert page.text == text
    page.click("generate")  # the page still works
    wait(is_drawing)
    page.click("stop")
    wait(lambda: not is_drawing())


def test_closing_the_page_stops_the_model(driver, endless):
    address, is_drawing = endless
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    page = Page(driver, address)
    page.click("generate")
    wait(lambda: len(page.text) > 600)
    assert is_drawing()
    driver.close()
    driver.switch_to.window(first)
    wait(lambda: not is_drawing())


@pytest.mark.parametrize("is_at_work", [False, True], ids=["idle", "at work"])
def test_interrupt_ends_it_without_a_traceback(driver, is_at_work):
    with serve() as process:
        page = Page(driver, process.address)
        if is_at_work:
            page.set_number("max_new_tokens", 2000)
            page.click("generate")
            wait(lambda: page.text)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, output, errors) == (0, "", "")
