"""Wallets in the browser: they sign people in, are linked and unlinked, and pay for credits.

The wallets are real but for their window: each holds a key of its chain and signs in this process.
What is paid is paid on a real chain, through the official facilitator.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import PASSWORD, Browser, hidden
from conftest import StartFarebox
from evm_chain import CHAIN_ID, DOMAIN, NETWORK, EvmChain
from facilitator import DROP, Asked, Facilitator
from injected_wallet import ICON, REFUSED, Injected, WalletError, inject
from market import TOP_UP, UNITS_PER_CREDIT, Books, challenge_of, x402_toml
from payers import EvmWallet
from playwright.sync_api import Locator, Route, expect
from screen import NARROW, WIDE, OpenScreen, Screen, look
from server import Farebox
from signers import EvmKey, Key, SolanaKey

DESKTOP: dict[str, Any] = {"width": WIDE}
PHONE: dict[str, Any] = {"width": NARROW, "scheme": "dark"}
SEPOLIA = "eip155:84532"
_numbers = count(1)
NO_WALLET = "No wallet was found in this browser."
CONFIG = """
[instance]
signup = "{signup}"

[upstreams.sandbox]
kind = "sandbox"

[[routes]]
path = "/api/v1/sms/send"
methods = ["POST"]
upstream = "sandbox"
adapter = "sms"
credits = 1
per = "sms_segment"
"""


@pytest.fixture(scope="module")
def chain() -> Iterator[EvmChain]:
    with EvmChain() as evm:
        yield evm


@pytest.fixture(scope="module")
def the_facilitator(chain: EvmChain) -> Iterator[Facilitator]:
    with Facilitator(evm=chain) as facilitator:
        yield facilitator


@pytest.fixture
def facilitator(the_facilitator: Facilitator) -> Facilitator:
    the_facilitator.forget()
    return the_facilitator


@pytest.fixture(scope="module")
def payee() -> str:
    return EvmWallet().address


@pytest.fixture(scope="module")
def box(
    start_farebox: StartFarebox, chain: EvmChain, the_facilitator: Facilitator, payee: str
) -> Farebox:
    """Anybody may sign up, and credits are sold."""
    sold = x402_toml(
        the_facilitator.url, {NETWORK: payee, SEPOLIA: payee}, {NETWORK: chain.url},
        topup_min=10, topup_max=50_000,
    )  # fmt: skip
    return start_farebox(CONFIG.format(signup="open") + sold)


@pytest.fixture(scope="module")
def closed(start_farebox: StartFarebox) -> Farebox:
    """Nobody may sign up, and nothing is sold."""
    return start_farebox(CONFIG.format(signup="closed"), workers=1)


@pytest.fixture(scope="module")
def books(box: Farebox) -> Iterator[Books]:
    found = Books(box)
    yield found
    found.db.close()


@pytest.fixture
def at(open_screen: OpenScreen) -> Callable[..., Screen]:
    """`at(box, wallet, …, **window)`: a browser with these wallets."""

    def opened(box: Farebox, *wallets: Injected, **window: Any) -> Screen:
        screen = open_screen(box, fresh=True, **window)
        inject(screen, *wallets)
        return screen

    return opened


At = Callable[..., Screen]


def offered(screen: Screen) -> Locator:
    return screen.page.locator("[data-wallets] button")


def choose(screen: Screen, wallet: Injected) -> None:
    """Press the button of a wallet."""
    offered(screen).filter(has_text=str(wallet.name)).click()


def led(screen: Screen, wallet: Injected, status: int = 200) -> None:
    """The same, which loads a page."""
    with screen.leads(status):
        choose(screen, wallet)


def news(screen: Screen) -> Locator:
    return screen.page.locator("[data-news]")


def problem(screen: Screen) -> Locator:
    return screen.page.get_by_role("alert")


def wallet_form(screen: Screen) -> dict[str, str]:
    """What the form of a wallet brings."""
    found: dict[str, str] = screen.page.evaluate(
        "() => Object.fromEntries(new FormData(document.querySelector('#wallet-form form')))"
    )
    return found


def somebody(screen: Screen, key: Key | None = None, page: str = "/dashboard/billing") -> Key:
    """Somebody new, whose other wallet has signed in at this browser; their key. A page is opened
    then."""
    box, key = screen.box, key or SolanaKey()
    asked = box.post("/api/v1/wallets/challenge", None, {"wallet": key.wallet}).json()
    aside = Browser(box)
    fields = hidden(aside.get("/login"), "/login/wallet")
    signed = {"message": asked["message"], "signature": key.sign_text(asked["message"])}
    assert aside.post("/login/wallet", fields | signed).status == 303
    screen.context.add_cookies(
        [{"name": name, "value": value, "url": box.url} for name, value in aside.cookies.items()]
    )
    screen.open(page)
    return key


def signed_in(screen: Screen, page: str) -> str:
    """Somebody new with a password, who has signed in; their e-mail."""
    box = screen.box
    email = f"owner{next(_numbers)}@example.com"
    box.set_up("users", "add", email, "--password-stdin", stdin=PASSWORD + "\n")
    screen.sign_in(email)
    screen.open(page)
    return email


# Signing in


@pytest.mark.parametrize(
    ("make", "window"),
    [
        pytest.param(EvmKey, DESKTOP, id="ethereum at a desk"),
        pytest.param(SolanaKey, PHONE, id="solana on a phone"),
    ],
)
def test_a_new_wallet_signs_in_and_is_the_same_person_next_time(
    box: Farebox, at: At, make: type[Key], window: dict[str, Any]
) -> None:
    wallet = Injected(make())
    screen = at(box, wallet, **window)
    page = screen.open("/login?next=/dashboard/settings")
    expect(offered(screen)).to_have_count(1)
    assert offered(screen).inner_text() == (
        f"Sign in with Test Wallet {'Ethereum' if make is EvmKey else 'Solana'}"
    )
    led(screen, wallet)
    assert urlsplit(page.url).path == "/dashboard/settings"
    expect(page.locator("header .who")).to_have_text(wallet.short)
    expect(page.get_by_text(wallet.key.wallet, exact=True)).to_be_visible()
    expect(page.get_by_text(f"wallet {wallet.short} · this browser")).to_be_visible()
    expect(page.get_by_text("a password goes with an e-mail")).to_be_visible()
    account = page.locator(".facts tr", has_text="Account").locator("code").inner_text()
    screen.press("Sign out")
    screen.open("/login")
    led(screen, wallet)
    assert urlsplit(page.url).path == "/dashboard"
    screen.open("/dashboard/settings")
    expect(page.get_by_text(account)).to_be_visible()


def test_sign_up_takes_wallets_too_and_shows_there_what_was_wrong(box: Farebox, at: At) -> None:
    wallet = Injected(SolanaKey())
    screen = at(box, wallet)
    wallet.answers["signMessage"] = [[0] * 64, [], wallet.accounts]
    page = screen.open("/signup")
    choose(screen, wallet)
    expect(news(screen)).to_have_text("Test Wallet signed something else than it was given.")
    del wallet.answers["signMessage"]
    other = SolanaKey()
    wallet.key.sign, right = other.sign, wallet.key.sign  # type: ignore[method-assign]
    led(screen, wallet, 401)
    expect(page.get_by_role("heading", name="Create an account")).to_be_visible()
    expect(problem(screen)).to_have_text(f"The message is not signed by {wallet.key.wallet}.")
    wallet.key.sign = right  # type: ignore[method-assign]
    led(screen, wallet)
    expect(page.locator("header .who")).to_have_text(wallet.short)


def test_where_sign_up_is_closed_only_known_wallets_get_in(closed: Farebox, at: At) -> None:
    wallet = Injected(EvmKey())
    screen = at(closed, wallet)
    page = screen.open("/login?next=/dashboard/usage")
    led(screen, wallet, 403)
    expect(problem(screen)).to_have_text("This wallet is not known here, and sign-up is closed.")
    assert page.locator("input[name=next]").first.get_attribute("value") == "/dashboard/usage"
    screen.open("/login/wallet")  # as who loads that answer again
    expect(page.get_by_role("heading", name="Sign in", exact=True)).to_be_visible()
    email = signed_in(screen, "/dashboard/settings")
    led(screen, wallet)
    screen.press("Sign out")
    led(screen, wallet)
    expect(page.locator("header .who")).to_have_text(email)


def test_a_message_is_good_once_and_the_page_says_so(box: Farebox, at: At) -> None:
    wallet = Injected(EvmKey())
    screen = at(box, wallet)
    screen.page.add_init_script(
        "HTMLFormElement.prototype.submit = function () { window.held = this; };"
    )
    page = screen.open("/login")
    choose(screen, wallet)
    expect(news(screen)).to_have_text("Signed. One moment …")
    fields = wallet_form(screen)
    send = """(fields) => {
        const form = document.querySelector('#wallet-form form');
        form.elements.message.value = fields.message;
        form.elements.signature.value = fields.signature;
        form.requestSubmit();
    }"""
    with screen.leads():
        page.evaluate(send, fields)
    expect(page.locator("header .who")).to_have_text(wallet.short)
    screen.press("Sign out")
    with screen.leads(401):
        page.evaluate(send, fields)
    expect(problem(screen)).to_have_text("This message was used before; ask for another.")


TROUBLES: dict[str, tuple[type[Key], Callable[[Injected], Any], str]] = {
    "a person refuses": (
        EvmKey, lambda w: w.refuse.update(personal_sign=REFUSED),
        "You refused in Test Wallet. Nothing was signed.",
    ),
    "a person refuses to connect": (
        EvmKey, lambda w: w.refuse.update(eth_requestAccounts=REFUSED),
        "You refused in Test Wallet. Nothing was signed.",
    ),
    "a person refuses on Solana, without a code": (
        SolanaKey,
        lambda w: w.refuse.update(signMessage=WalletError(None, "Approval Denied")),
        "You refused in Test Wallet. Nothing was signed.",
    ),
    "it is locked": (
        EvmKey, lambda w: w.accounts.clear(),
        "Test Wallet gave no account on Ethereum. Unlock it, allow this page to use one, and try"
        " again.",
    ),
    "it is locked on Solana": (
        SolanaKey, lambda w: w.accounts.clear(),
        "Test Wallet gave no account on Solana. Unlock it, allow this page to use one, and try"
        " again.",
    ),
    "its account is of another kind of chain": (
        EvmKey, lambda w: w.answers.update(eth_requestAccounts=["T" * 34]),
        "Test Wallet gave no account on Ethereum. Unlock it, allow this page to use one, and try"
        " again.",
    ),
    "it waits for something else": (
        EvmKey,
        lambda w: w.refuse.update(eth_requestAccounts=WalletError(-32002, "Already processing.")),
        "Test Wallet waits for an answer to something else: open it, answer there, and try again.",
    ),
    "its account changes in the middle": (
        EvmKey,
        lambda w: w.before.update(
            personal_sign=lambda: w.accounts.__setitem__(0, EvmKey(b"\2" * 32).address)
        ),
        "Test Wallet changed its account in the middle. Nothing was sent; try again.",
    ),
    "its account changes in the middle on Solana": (
        SolanaKey, lambda w: w.before.update(signMessage=w.accounts.clear),
        "Test Wallet changed its account in the middle. Nothing was sent; try again.",
    ),
    "it is a contract": (
        EvmKey, lambda w: w.answers.update(personal_sign="0x" + "ab" * 96),
        "This account of Test Wallet is a contract, whose signature counts for nothing here. Use"
        " an ordinary account.",
    ),
    "it signs nothing": (
        EvmKey, lambda w: w.answers.update(personal_sign=None),
        "Test Wallet gave no signature.",
    ),
    "it cannot sign messages": (
        SolanaKey, lambda w: setattr(w, "signs", False), "Test Wallet cannot sign messages.",
    ),
    "it fails at length": (
        EvmKey,
        lambda w: w.refuse.update(
            personal_sign=WalletError(-32603, "<b>\u202eInternal</b>\n" + "x" * 400)
        ),
        "Test Wallet failed: <b>Internal</b>" + "x" * 184 + "…",
    ),
    "it fails and says nothing": (
        EvmKey, lambda w: w.refuse.update(personal_sign=WalletError(-32603, "")),
        "Test Wallet failed, and did not say why.",
    ),
}  # fmt: skip


def test_what_goes_wrong_in_a_wallet_is_said_on_the_page(box: Farebox, at: At) -> None:
    wallets = []
    for number, (make, wrong, _) in enumerate(TROUBLES.values()):
        wallet = Injected(make(), name=f"Test Wallet {number:02}")
        wrong(wallet)
        wallets.append(wallet)
    screen = at(box, *wallets)
    page = screen.open("/login")
    found = {}
    for wallet, what in zip(wallets, TROUBLES, strict=True):
        choose(screen, wallet)
        expect(news(screen)).to_have_class("problem")
        expect(news(screen)).to_contain_text(str(wallet.name))
        found[what] = news(screen).inner_text().replace(str(wallet.name), "Test Wallet")
    assert found == {what: words for what, (_, _, words) in TROUBLES.items()}
    assert urlsplit(page.url).path == "/login"


def test_a_device_that_counts_from_zero_signs_in(box: Farebox, at: At) -> None:
    wallet = Injected(EvmKey())
    sign = wallet.key.sign
    wallet.key.sign = (
        lambda text: (  # type: ignore[method-assign]
            (made := sign(text))[:64] + bytes([made[64] - 27])
        )
    )
    screen = at(box, wallet)
    screen.open("/login")
    led(screen, wallet)
    expect(screen.page.locator("header .who")).to_have_text(wallet.short)


# Finding wallets


def test_without_a_wallet_the_page_says_so_until_one_arrives(box: Farebox, at: At) -> None:
    late = Injected(EvmKey(), name="Latecomer", is_late=True)
    later = Injected(SolanaKey(), name="Straggler", is_late=True)
    screen = at(box, late, later)
    page = screen.open("/login")
    expect(page.get_by_text(NO_WALLET)).to_be_visible()
    page.evaluate(f"() => window.arrive{late.number}()")
    expect(offered(screen)).to_have_text(["Sign in with Latecomer Ethereum"])
    expect(page.get_by_text(NO_WALLET)).to_be_hidden()
    page.evaluate(f"() => window.arrive{later.number}()")
    expect(offered(screen)).to_have_count(2)
    led(screen, later)
    expect(page.locator("header .who")).to_have_text(later.short)


def test_each_wallet_is_offered_once_by_its_own_name(box: Farebox, at: At) -> None:
    key = EvmKey()
    first = Injected(key, name="First Wallet")
    second = Injected(EvmKey(), name="Second Wallet")
    both = Injected(SolanaKey(), name="First Wallet")
    same = Injected(
        key, name="hidden", kind="window"
    )  # the older way, of one that announces itself
    other = Injected(SolanaKey(), name="Of another chain", chains=["sui:mainnet"])
    screen = at(box, first, second, both, same, other)
    screen.open("/login")
    expect(offered(screen)).to_have_text(
        [
            "Sign in with First Wallet Ethereum",
            "Sign in with Second Wallet Ethereum",
            "Sign in with First Wallet Solana",
        ]
    )
    led(screen, second)
    expect(screen.page.locator("header .who")).to_have_text(second.short)
    assert first.asked == both.asked == other.asked == []


def test_a_wallet_of_the_older_way_is_offered_where_none_announces_itself(
    box: Farebox, at: At
) -> None:
    wallet = Injected(EvmKey(), name="This browser’s wallet", kind="window")
    screen = at(box, wallet)
    screen.open("/login")
    expect(offered(screen)).to_have_text(["Sign in with This browser’s wallet Ethereum"])
    led(screen, wallet)
    expect(screen.page.locator("header .who")).to_have_text(wallet.short)


def test_what_wallets_say_of_themselves_is_text_and_short(box: Farebox, at: At) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    names = [
        hostile, "W" * 5000, "\u202eevil\u2066\nsecond\0 line", "", 17, None, "🦊" * 50,
        "שלום",
    ]  # fmt: skip
    icons = [
        "javascript:alert(1)",
        "https://elsewhere.example/icon.png",
        "data:text/html,<b>",
        "data:image/png;base64," + "A" * 200_001,
        "/logout",
        5,
        "data:image/png;base64,bad",
        ICON,
    ]
    wallets = [
        Injected(EvmKey(b"\3" * 32), name=name, icon=icon)
        for name, icon in zip(names, icons, strict=True)
    ]
    crowd = [Injected(EvmKey(b"\3" * 32), name=f"One of many {n}") for n in range(20)]
    screen = at(box, *wallets, *crowd, width=NARROW)
    page = screen.open("/login")
    expect(offered(screen)).to_have_count(20)
    assert [shown.removeprefix("Sign in with ") for shown in offered(screen).all_inner_texts()][
        : len(names)
    ] == [
        f"{name} Ethereum"
        for name in (
            hostile, "W" * 39 + "…", "evilsecond line", "A wallet without a name",
            "A wallet without a name", "A wallet without a name", "🦊" * 39 + "…", "שלום",
        )
    ]  # fmt: skip
    sources = page.eval_on_selector_all("[data-wallets] img", "all => all.map((each) => each.src)")
    assert set(sources) == {ICON}
    assert screen.sticking_out() == []


def test_without_scripts_one_line_says_what_wallets_need(
    box: Farebox, open_screen: OpenScreen
) -> None:
    screen = open_screen(box, scripts=False)
    for path in ("/login", "/signup"):
        page = screen.open(path)
        expect(page.get_by_text("Wallets need JavaScript, which is off here.")).to_have_count(1)
    somebody(screen)
    for path in ("/dashboard/settings", "/dashboard/billing"):
        page = screen.open(path)
        expect(page.get_by_text("Wallets need JavaScript, which is off here.")).to_have_count(1)
        assert page.get_by_role("button", name=re.compile("^(Give up|Send it again)")).count() == 0


def test_a_wallet_is_chosen_by_keyboard_and_its_words_are_read_aloud(box: Farebox, at: At) -> None:
    wallet = Injected(EvmKey())
    wallet.refuse["personal_sign"] = REFUSED
    screen = at(box, wallet)
    page = screen.open("/login")
    expect(offered(screen)).to_have_count(1)
    screen.tab_to("[data-wallets] button")
    page.keyboard.press("Enter")
    told = page.get_by_role("status").filter(has_text="You refused in Test Wallet.")
    expect(told).to_be_visible()
    assert page.evaluate("() => document.activeElement.closest('[data-wallets]') !== null")
    wallet.refuse.clear()
    with screen.leads():
        page.keyboard.press("Space")
    expect(page.locator("header .who")).to_have_text(wallet.short)


# Settings


def test_wallets_are_linked_sign_in_as_their_person_and_are_unlinked(box: Farebox, at: At) -> None:
    ethereum, solana = Injected(EvmKey(), name="Ether"), Injected(SolanaKey(), name="Sol")
    screen = at(box, ethereum, solana)
    page = screen.page
    person = Injected(somebody(screen, page="/dashboard/settings")).short
    for wallet in (ethereum, solana):
        led(screen, wallet)
        expect(page.get_by_role("status").first).to_have_text(f"Linked {wallet.short}.")
        expect(page.locator("li", has_text=wallet.key.wallet)).to_contain_text("linked 20")
    led(screen, ethereum)
    expect(page.get_by_role("status").first).to_have_text(f"{ethereum.short} was linked already.")
    for wallet in (ethereum, solana):
        screen.press("Sign out")
        led(screen, wallet)
        expect(page.locator("header .who")).to_have_text(person)

    screen.open("/dashboard/settings")
    row = page.locator("li", has_text=ethereum.key.wallet)
    with screen.leads():
        row.get_by_role("button", name=f"Unlink {ethereum.key.wallet}").click()
    expect(page.get_by_role("heading", name="Unlink this wallet?")).to_be_visible()
    with screen.leads():
        page.get_by_role("link", name="Leave it").click()
    with screen.leads():
        row.get_by_role("button", name="Unlink").click()
    screen.press("Unlink")
    expect(page.get_by_role("status").first).to_have_text(
        f"Unlinked {ethereum.short}. It signs nothing here any more."
    )
    expect(row).to_have_count(0)
    screen.press("Sign out")
    led(screen, ethereum)  # as somebody else, because anybody may sign up
    expect(page.locator("header .who")).to_have_text(ethereum.short)


def test_somebody_elses_wallet_is_not_linked_and_the_only_way_in_not_unlinked(
    box: Farebox, at: At
) -> None:
    wallet = Injected(EvmKey())
    screen = at(box, wallet)
    page = screen.page
    somebody(screen, wallet.key, "/dashboard/settings")
    with screen.leads():
        page.get_by_role("button", name=f"Unlink {wallet.key.wallet}").click()
    screen.press("Unlink", 409)
    expect(problem(screen)).to_have_text("That is the only way left to sign in.")
    somebody(screen, page="/dashboard/settings")
    led(screen, wallet, 409)
    expect(problem(screen)).to_have_text("This wallet belongs to another account.")
    screen.open("/dashboard/settings/wallets")  # as who loads that answer again
    expect(page.get_by_role("heading", name="Wallets")).to_be_visible()
    assert page.locator("li", has_text=wallet.key.wallet).count() == 0
    screen.open(f"/dashboard/settings/wallets/unlink?wallet={wallet.key.wallet}", 404)


def test_in_somebody_elses_account_wallets_are_only_looked_at(box: Farebox, at: At) -> None:
    """And a person without an e-mail is called by their wallet, wherever a name stands."""
    wallet, guest = Injected(EvmKey(), name="Mine"), Injected(SolanaKey(), name="Guest’s")
    screen = at(box, wallet, guest, **PHONE)
    page = screen.page
    somebody(screen, wallet.key, "/dashboard/settings")
    page.get_by_label("Email").fill("whoever@example.com")
    screen.press("Invite")
    link = page.locator("code", has_text="/invite?token=").inner_text()
    screen.press("Sign out")
    path = urlsplit(link)
    page = screen.open(f"{path.path}?{path.query}")
    expect(page.get_by_role("heading", name=f"Join {wallet.short}")).to_be_visible()
    with screen.leads():
        page.get_by_role("link", name="Sign in first").click()
    led(screen, guest)
    expect(page.locator("main strong")).to_have_text(guest.short)
    screen.press("Join")
    expect(page.get_by_role("status").first).to_have_text(
        f"You have joined {wallet.short}’s account."
    )
    expect(page.get_by_label("Account").locator("option").nth(1)).to_contain_text(
        f"{wallet.short}’s account"
    )
    screen.open("/dashboard/settings")
    expect(page.locator("li", has_text=wallet.key.wallet)).to_be_visible()
    expect(page.get_by_text("Yours are linked in an account of your own")).to_be_visible()
    assert page.locator("#wallet-form").count() == 0
    assert page.get_by_role("button", name="Unlink").count() == 0
    members = page.locator("section", has=page.get_by_role("heading", name="Members"))
    expect(members.locator("li strong")).to_have_text([wallet.short, guest.short])


# An account that a payment has opened


def bought(box: Farebox, chain: EvmChain, credits: int) -> EvmWallet:
    """A wallet whose payment has opened an account with so many credits."""
    payer = EvmWallet()
    chain.mint(payer.address, credits * UNITS_PER_CREDIT)
    body = {"credits": credits}
    header = payer.header(challenge_of(box.post(TOP_UP, None, body)))
    answer = box.post(TOP_UP, None, body, PAYMENT_SIGNATURE=header)
    assert answer.status == 200, answer.body
    return payer


def test_what_a_wallet_has_paid_for_is_there_when_it_signs_in_or_is_linked(
    box: Farebox, chain: EvmChain, facilitator: Facilitator, at: At
) -> None:
    wallets = []
    for name, credits in (("Signs in", 17), ("Is linked", 25)):
        payer = bought(box, chain, credits)
        wallets.append(Injected(EvmKey(payer.account.key), name=name))
    first, second = wallets
    screen = at(box, *wallets)
    page = screen.open("/login?next=/dashboard/billing")
    led(screen, first)
    expect(page.locator("#balance-now")).to_have_text("17 credits")
    screen.open("/dashboard/settings")
    led(screen, second)
    screen.open("/dashboard/billing")
    expect(page.locator("#balance-now")).to_have_text("42 credits")
    assert (
        f"from {second.key.wallet}" in page.locator("section", has_text="Ledger").last.inner_text()
    )


# Paying


@pytest.fixture
def shop(
    box: Farebox, chain: EvmChain, facilitator: Facilitator, payee: str, at: At
) -> Callable[..., tuple[Screen, Injected]]:
    """`shop(credits=…, **of_the_wallet)`: somebody on Billing, and the wallet they can pay with."""

    def opened(credits: int = 1000, wallet: Any = None, **more: Any) -> tuple[Screen, Injected]:
        wallet = Injected(EvmKey(), **more)
        if credits:
            chain.mint(wallet.key.address, credits * UNITS_PER_CREDIT)
        screen = at(box, wallet)
        somebody(screen)
        return screen, wallet

    return opened


Shop = Callable[..., tuple[Screen, Injected]]


def pay(screen: Screen, wallet: Injected, *statuses: int) -> None:
    with screen.expecting(402, *statuses):  # what a price is asked with
        choose(screen, wallet)
        expect(news(screen)).not_to_contain_text(re.compile("Waiting|Paying"), timeout=20_000)


def test_credits_are_paid_for_on_a_chain_once_the_wallet_is_on_it(
    box: Farebox, books: Books, chain: EvmChain, payee: str, facilitator: Facilitator, shop: Shop
) -> None:
    screen, wallet = shop()
    page, earned = screen.page, chain.balance(payee)
    expect(page.get_by_label("Credits", exact=True)).to_have_value("100")
    expect(page.locator("#pay-price")).to_have_text("1.00 USDC")
    page.get_by_label("Credits", exact=True).fill("250")
    expect(page.locator("#pay-price")).to_have_text("2.50 USDC")
    expect(page.get_by_label("Network").locator("option")).to_have_text(["Base", "Base Sepolia"])
    assert wallet.chain == 1
    pay(screen, wallet)
    expect(news(screen)).to_have_text(
        "Added 250 credits for 2.50 USDC. The balance is 250 credits. Load this page again to see"
        " it in the ledger."
    )
    expect(page.locator("#balance-now")).to_have_text("250 credits")
    assert chain.balance(payee) - earned == 250 * UNITS_PER_CREDIT
    assert chain.balance(wallet.key.address) == 750 * UNITS_PER_CREDIT
    assert wallet.asked.index("wallet_switchEthereumChain") < wallet.asked.index(
        "eth_signTypedData_v4"
    )
    (typed,) = wallet.typed
    assert typed["domain"] == DOMAIN and typed["domain"]["chainId"] == CHAIN_ID
    assert typed["message"]["value"] == str(250 * UNITS_PER_CREDIT)
    screen.open("/dashboard/billing")
    shown = page.get_by_role("region", name="The latest entries").inner_text()
    assert "Top-up of 2.50 USDC on Base" in shown and wallet.key.wallet in shown
    assert books.of(EvmWallet(wallet.key.account.key)) is None  # it went to the person's account


def test_a_wallet_on_another_network_signs_nothing(
    chain: EvmChain, facilitator: Facilitator, shop: Shop
) -> None:
    screen, wallet = shop()
    wallet.refuse["wallet_switchEthereumChain"] = REFUSED
    pay(screen, wallet)
    expect(news(screen)).to_have_text(
        "You refused in Test Wallet to switch to Base. Nothing was signed."
    )
    del wallet.refuse["wallet_switchEthereumChain"]
    screen.page.get_by_label("Network").select_option("Base Sepolia")
    pay(screen, wallet)
    expect(news(screen)).to_have_text(
        "Test Wallet does not know Base Sepolia. Add that network there, and try again."
    )
    screen.page.get_by_label("Network").select_option("Base")
    wallet.refuse["wallet_switchEthereumChain"] = WalletError(4200, "Not supported.")
    pay(screen, wallet)
    expect(news(screen)).to_have_text(
        "Test Wallet did not switch to Base. Switch there, and try again."
    )
    wallet.refuse.clear()
    wallet.answers["wallet_switchEthereumChain"] = None  # says it did, and did not
    pay(screen, wallet)
    expect(news(screen)).to_contain_text("is on another network than Base. Nothing was signed")
    wallet.answers.clear()
    wallet.chain = "not a number"
    wallet.knows = set()
    pay(screen, wallet)
    expect(news(screen)).to_contain_text("does not know Base.")
    wallet.chain, wallet.before["eth_accounts"] = CHAIN_ID, lambda: setattr(wallet, "chain", 5)
    pay(screen, wallet)  # it went elsewhere at the last moment
    expect(news(screen)).to_contain_text("is on another network than Base. Nothing was signed")
    assert "eth_signTypedData_v4" not in wallet.asked
    assert facilitator.calls["settle"] == 0


def test_what_is_refused_or_cannot_be_paid_moves_nothing_and_can_be_tried_again(
    chain: EvmChain, payee: str, facilitator: Facilitator, shop: Shop
) -> None:
    screen, wallet = shop(credits=20, chain=CHAIN_ID)
    page, earned = screen.page, chain.balance(payee)
    wallet.refuse["eth_signTypedData_v4"] = REFUSED
    pay(screen, wallet)
    expect(news(screen)).to_have_text("You refused in Test Wallet. Nothing was signed.")
    wallet.refuse.clear()
    pay(screen, wallet)  # it has a fifth of what this costs
    expect(news(screen)).to_contain_text("Not paid, and no money moved.")
    expect(page.locator("#pay-again")).to_be_hidden()
    wallet.before["eth_signTypedData_v4"] = lambda: wallet.accounts.__setitem__(
        0, EvmWallet().address
    )
    pay(screen, wallet)
    expect(news(screen)).to_contain_text("changed its account in the middle")
    wallet.before.clear()
    wallet.accounts[:] = [wallet.key.address]
    for wrong in ("9", "50001", "", "12.5"):
        page.get_by_label("Credits", exact=True).fill(wrong)
        choose(screen, wallet)
        expect(news(screen)).to_have_text("Choose a whole number of credits from 10 to 50,000.")
        expect(page.get_by_label("Credits", exact=True)).to_be_focused()
    page.get_by_label("Credits", exact=True).fill("20")
    signed = len(wallet.typed)

    def dearer(route: Route) -> None:
        asked = route.fetch()
        told = asked.json()
        told["accepts"][0]["amount"] = "200001"
        route.fulfill(response=asked, json=told)

    page.route(f"**{TOP_UP}", dearer)
    pay(screen, wallet)
    expect(news(screen)).to_have_text("The price has changed. Load this page again.")
    assert len(wallet.typed) == signed
    page.unroute_all()
    pay(screen, wallet)
    expect(news(screen)).to_contain_text("Added 20 credits for 0.20 USDC.")
    assert chain.balance(payee) - earned == 20 * UNITS_PER_CREDIT


@contextlib.contextmanager
def losing_answers(screen: Screen) -> Iterator[list[str]]:
    """Payments reach the server, and its answers are lost on their way; the payments."""
    sent: list[str] = []

    def lose(route: Route) -> None:
        header = route.request.headers.get("payment-signature")
        if header is None:
            route.continue_()
            return
        sent.append(header)
        assert route.fetch().status == 200
        route.abort("connectionreset")

    screen.page.route(f"**{TOP_UP}", lose)
    yield sent
    screen.page.unroute_all()
    screen.faults[:] = [each for each in screen.faults if "ERR_CONNECTION_RESET" not in each]


def test_a_lost_answer_is_asked_for_again_and_the_money_goes_once(
    chain: EvmChain, payee: str, facilitator: Facilitator, shop: Shop
) -> None:
    screen, wallet = shop(chain=CHAIN_ID)
    page, earned = screen.page, chain.balance(payee)
    with losing_answers(screen) as sent:
        pay(screen, wallet)
    unsure = page.locator("#pay-unsure")
    expect(unsure).to_contain_text("A payment of 1.00 USDC on Base for 100 credits is signed")
    expect(unsure).to_contain_text("Do not pay again")
    expect(page.get_by_role("button", name="Send it again")).to_be_focused()
    expect(offered(screen)).to_be_disabled()
    offered(screen).click(force=True)  # which does nothing
    page.reload()
    expect(unsure).to_be_visible()
    expect(offered(screen)).to_be_disabled()
    offered(screen).click(force=True)
    with losing_answers(screen) as sent_again:
        page.get_by_role("button", name="Send it again").click()
        expect(news(screen)).to_contain_text("send the same payment again")
    assert sent == sent_again
    page.get_by_role("button", name="Send it again").click()
    expect(news(screen)).to_contain_text("Added 100 credits for 1.00 USDC.")
    expect(unsure).to_be_hidden()
    expect(page.locator("#balance-now")).to_have_text("100 credits")
    assert len(wallet.typed) == 1
    assert chain.balance(payee) - earned == 100 * UNITS_PER_CREDIT
    page.reload()
    expect(page.locator("#balance-now")).to_have_text("100 credits")
    expect(offered(screen)).to_be_enabled()
    expect(unsure).to_be_hidden()


def test_a_payment_nobody_knows_the_end_of_is_of_its_own_account(
    box: Farebox, chain: EvmChain, payee: str, facilitator: Facilitator, shop: Shop
) -> None:
    screen, wallet = shop(chain=CHAIN_ID)
    page, earned = screen.page, chain.balance(payee)

    def lost(asked: Asked) -> Any:
        return DROP

    facilitator.before_settle = lost
    pay(screen, wallet, 503)
    expect(news(screen)).to_contain_text("Whether the payment was settled is not known yet.")
    expect(page.get_by_role("button", name="Send it again")).to_be_visible()
    # Somebody else at the same browser is not bothered with it.
    somebody(screen)
    expect(offered(screen)).to_be_enabled()
    expect(page.locator("#pay-unsure")).to_be_hidden()
    assert chain.balance(payee) == earned


def test_paying_is_given_up_while_the_wallet_is_asked(
    chain: EvmChain, facilitator: Facilitator, shop: Shop
) -> None:
    screen, wallet = shop(chain=CHAIN_ID)
    page = screen.page
    page.evaluate(
        """() => {
            const ask = window.askWallet;
            window.askWallet = async (number, method, params) => {
                if (method !== 'eth_signTypedData_v4') return ask(number, method, params);
                await new Promise((go) => { window.go = go; });
                return window.signed = ask(number, method, params);
            };
        }"""
    )
    with screen.expecting(402):
        choose(screen, wallet)
        expect(news(screen)).to_contain_text(
            "sign the payment of 1.00 USDC there, within 2 minutes"
        )
    expect(offered(screen)).to_be_disabled()
    page.get_by_role("button", name="Give up").click()
    expect(news(screen)).to_contain_text("Given up. Nothing was paid")
    expect(offered(screen)).to_be_enabled()
    page.evaluate("async () => { window.go(); await window.signed; await fetch('/healthz'); }")
    assert len(wallet.typed) == 1  # after all, and too late
    assert page.evaluate("() => sessionStorage.length") == 0
    expect(news(screen)).to_contain_text("Given up. Nothing was paid")
    nonce = wallet.typed[0]["message"]["nonce"]
    assert not [each for each in facilitator.settles if nonce in str(each.payload)]


def test_where_nothing_is_sold_nothing_is_offered(closed: Farebox, at: At) -> None:
    screen = at(closed, Injected(EvmKey()))
    signed_in(screen, "/dashboard/billing")
    page = screen.page
    expect(page.get_by_role("heading", name="Add credits")).to_be_visible()
    assert page.get_by_text("Pay with wallet").count() == 0
    assert offered(screen).count() == 0


def test_without_a_wallet_of_ethereum_billing_says_so(box: Farebox, at: At) -> None:
    screen = at(box, Injected(SolanaKey()))
    somebody(screen)
    page = screen.page
    expect(page.get_by_text("No wallet for Ethereum’s networks was found")).to_be_visible()


# Every page, looked at


@pytest.mark.parametrize(
    "window", [pytest.param(DESKTOP, id="desktop"), pytest.param(PHONE, id="phone")]
)
def test_every_page_with_wallets_can_be_used_by_everybody(
    box: Farebox, at: At, window: dict[str, Any]
) -> None:
    wallet = Injected(EvmKey())
    several = (
        wallet, Injected(SolanaKey(), name="Second " * 9),
        Injected(SolanaKey(), name="Third", icon=None),
    )  # fmt: skip
    screen = at(box, *several, **window)
    look(screen, "/login" if window is DESKTOP else "/signup")
    somebody(screen, wallet.key, "/dashboard/settings")
    look(screen, "/dashboard/settings")
    if window is PHONE:
        look(screen, f"/dashboard/settings/wallets/unlink?wallet={wallet.key.wallet}")
    page = screen.open("/dashboard/billing")
    account = page.locator("#pay").get_attribute("data-account")
    page.evaluate(
        "(account) => sessionStorage.setItem(`farebox-payment-${account}`, JSON.stringify("
        "{header: 'e30=', body: '{}', credits: 100, units: '1000000', title: 'Base'}))",
        account,
    )
    look(screen, "/dashboard/billing")
    expect(page.get_by_role("button", name="Send it again")).to_be_visible()
