"""A walk through the views of a report, as somebody takes it who looks for a latent and judges it."""

from typing import Any

WIDER = "document.documentElement.scrollWidth > innerWidth"
SHOWN = "rows => rows.sort((a, b) => a.offsetTop - b.offsetTop).map(row => Number(row.dataset.id))"


class Walk:
    """One page and what must hold in every view: as wide as the window, the focus on something.

    Args:
        page: of playwright, on the overview of a report with every view.
    """

    def __init__(self, page: Any) -> None:
        self.page = page

    def arrived(self, selector: str) -> None:
        """Wait for what shows that a view is there, and look at it."""
        self.page.wait_for_selector(selector, state="visible")
        assert not self.page.evaluate(WIDER), self.page.url
        assert self.page.evaluate("document.activeElement !== document.body"), f"the focus is lost at {self.page.url}"

    def rows(self) -> list[int]:
        """The latents of the list, from the top."""
        return list(self.page.eval_on_selector_all(".rows .row", SHOWN))

    def go(self) -> None:
        """Search, sort, open, next, neighbour, compare, map, try, judge, known answers, another SAE, and back."""
        self.list_and_latents()
        self.comparison()
        self.map()
        self.passages_and_words()
        self.judge()
        self.page.click("nav >> text=Toy")
        self.arrived("h1:text-is('Known answers')")
        self.page.select_option("#sae-switch", "toy")
        self.arrived("#view h1:text-is('Known answers')")
        self.page.click("nav >> text=Latents")
        self.arrived(".rows [data-id='0']")
        self.back()

    def list_and_latents(self) -> None:
        page = self.page
        page.fill("#query", "self")
        page.press("#query", "Enter")
        self.arrived(".rows .row .t")
        assert "q=self" in page.url
        page.click("[data-sort=max]")
        self.arrived("[aria-sort=descending] [data-sort=max]")
        first, second = self.rows()[:2]
        page.click(f".rows [data-id='{first}'] .id a")
        self.arrived(f"h1:text-is('Latent {first}')")
        self.arrived(".pager [data-key=']']")
        page.keyboard.press("]")
        self.arrived(f"h1:text-is('Latent {second}')")
        neighbour = page.text_content("section:has(> h2:text('Neighbours')) .peers a")
        page.click("section:has(> h2:text('Neighbours')) .peers a >> nth=0")
        self.arrived(f"h1:text-is('Latent {neighbour}')")

    def comparison(self) -> None:
        page = self.page
        page.click(".elsewhere a >> nth=0")
        self.arrived("h1:text-is('Compare')")
        page.click(".pair-list button >> nth=0")
        self.arrived(".beside .contexts")
        page.click(".pair-tabs [data-list=only-a]")
        self.arrived(".pair-tabs [data-list=only-a][aria-current]")

    def map(self) -> None:
        page = self.page
        page.click("nav >> text=Map")
        self.arrived(".map-near li")
        page.hover("canvas.map")
        page.click("[aria-label='zoom in (+)']")
        nearest = page.text_content(".map-near a")
        page.click(".map-near a >> nth=0")
        self.arrived(f"h1:text-is('Latent {nearest}')")
        page.go_back()
        self.arrived(".map-near li")

    def passages_and_words(self) -> None:
        page = self.page
        page.click("nav >> text=Try it")
        self.arrived(".reader .firing li")
        page.select_option(".choose select", "2")
        page.click(".on-token [data-latent] >> nth=0")
        self.arrived(".reading [class*=' a']")
        page.fill("textarea", "self None")
        page.click("text=Look up")
        self.arrived(".words .found")

    def judge(self) -> None:
        page = self.page
        page.click("nav >> text=Latents")
        self.arrived(".rows .row .t")
        page.click(".list-tools >> text=judge")
        self.arrived("h1:text-is('Judge latents')")
        page.keyboard.press("1")
        self.arrived("#revealed")
        page.keyboard.press("]")
        self.arrived("#judged:text-is('1 of 30 judged')")

    def back(self) -> None:
        """Back to the overview, step by step."""
        for _ in range(30):
            if self.page.is_visible("#overview"):
                break
            before = self.page.url
            self.page.go_back()
            self.page.wait_for_function("url => location.href !== url", arg=before)
            self.arrived("#view h1, #overview h1")
        self.arrived("#overview h1")
