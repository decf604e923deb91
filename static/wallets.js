// The wallets of this browser: found as they announce themselves, offered by their own names, and
// asked to sign. Ethereum's by EIP-6963 (or as `window.ethereum`, where there is none), Solana's by
// the Wallet Standard.
//
// What a wallet says of itself is an extension's word: it is shown as text, and not much of it.

const MOST = 20;
const LONGEST_NAME = 40;
const LONGEST_ICON = 200000;
const LONGEST_WORDS = 200;
const SETTLED_MS = 400; // after which no wallet is said to be here; one that comes later is shown
const SIGNATURE = /^0x[0-9a-f]{130}$/i; // of a key; a contract's is of another length
// What wallets say when a person says no, where they give no code for it.
const REFUSED = /reject|denied|declin|cancel/i;

/** Something that a person is told in these words. */
export class Trouble extends Error {}

/** A text of somebody else's: no more than so long, on one line, and written in one direction. */
function plain(text, longest) {
  if (typeof text !== "string") return "";
  const told = text.slice(0, 4 * longest).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, "").trim();
  const letters = [...told];
  return letters.length > longest ? `${letters.slice(0, longest - 1).join("")}…` : told;
}

function icon(text) {
  const fits = typeof text === "string" && text.length <= LONGEST_ICON;
  return fits && /^data:image\/(png|jpeg|gif|webp|svg\+xml)[;,]/.test(text) ? text : null;
}

class Wallet {
  constructor(chain, name, picture) {
    this.chain = chain;
    this.name = plain(name, LONGEST_NAME) || "A wallet without a name";
    this.icon = icon(picture);
  }

  /** What a person is told of what it threw. */
  words(error) {
    if (error instanceof Trouble) return error.message;
    const said = plain(error?.message, LONGEST_WORDS);
    const code = error?.code;
    if (code === 4001 || code === "ACTION_REJECTED" || (code !== -32603 && REFUSED.test(said))) {
      return `You refused in ${this.name}. Nothing was signed.`;
    }
    if (code === -32002) {
      return `${this.name} waits for an answer to something else: open it, answer there, and try again.`;
    }
    if (code === 4100) return `${this.name} does not let this page use that account. Allow it there, and try again.`;
    if (code === 4900 || code === 4901) return `${this.name} is not connected to its network. Try again when it is.`;
    return said ? `${this.name} failed: ${said}` : `${this.name} failed, and did not say why.`;
  }

  noAccount() {
    return new Trouble(`${this.name} gave no account on ${this.chain}. Unlock it, allow this page to use one, and try again.`);
  }

  changed() {
    return new Trouble(`${this.name} changed its account in the middle. Nothing was sent; try again.`);
  }
}

export class Ethereum extends Wallet {
  constructor(provider, info) {
    super("Ethereum", info.name, info.icon);
    this.provider = provider;
  }

  ask(method, params = []) {
    return this.provider.request({ method, params });
  }

  /** The account to sign with, as `id` and `address`. */
  async connect() {
    return this.account(await this.ask("eth_requestAccounts"));
  }

  account(accounts) {
    const address = Array.isArray(accounts) ? accounts[0] : null;
    if (typeof address !== "string" || !/^0x[0-9a-f]{40}$/i.test(address)) throw this.noAccount();
    return { id: `eip155:${address}`, address };
  }

  /** Whether it would still sign with that account. */
  async require(account) {
    const now = this.account(await this.ask("eth_accounts"));
    if (now.address.toLowerCase() !== account.address.toLowerCase()) throw this.changed();
  }

  async signText(account, text) {
    const hex = Array.from(new TextEncoder().encode(text), (byte) => byte.toString(16).padStart(2, "0"));
    return this.signature(await this.ask("personal_sign", [`0x${hex.join("")}`, account.address]));
  }

  async signTyped(account, typed) {
    return this.signature(await this.ask("eth_signTypedData_v4", [account.address, JSON.stringify(typed)]));
  }

  signature(signed) {
    if (typeof signed !== "string" || !/^0x([0-9a-f]{2})+$/i.test(signed)) {
      throw new Trouble(`${this.name} gave no signature.`);
    }
    if (!SIGNATURE.test(signed)) {
      throw new Trouble(`This account of ${this.name} is a contract, whose signature counts for nothing here. Use an ordinary account.`);
    }
    const last = parseInt(signed.slice(-2), 16); // some devices count from 0 what others count from 27
    return last < 2 ? `${signed.slice(0, -2)}${(27 + last).toString(16)}` : signed;
  }

  /** Be on that network, or throw: nothing is signed on another. `title` is what people call it. */
  async switchTo(number, title) {
    if (await this.isOn(number)) return;
    try {
      await this.ask("wallet_switchEthereumChain", [{ chainId: `0x${number.toString(16)}` }]);
    } catch (error) {
      if (error?.code === 4001) {
        throw new Trouble(`You refused in ${this.name} to switch to ${title}. Nothing was signed.`);
      }
      if (error?.code === 4902 || error?.data?.originalError?.code === 4902) {
        throw new Trouble(`${this.name} does not know ${title}. Add that network there, and try again.`);
      }
      throw new Trouble(`${this.name} did not switch to ${title}. Switch there, and try again.`);
    }
    await this.requireOn(number, title);
  }

  async requireOn(number, title) {
    if (!(await this.isOn(number))) {
      throw new Trouble(`${this.name} is on another network than ${title}. Nothing was signed; switch there, and try again.`);
    }
  }

  async isOn(number) {
    try {
      return BigInt(await this.ask("eth_chainId")) === number;
    } catch (error) {
      if (error instanceof SyntaxError || error instanceof TypeError) return false;
      throw error;
    }
  }
}

export class Solana extends Wallet {
  constructor(wallet) {
    super("Solana", wallet.name, wallet.icon);
    this.wallet = wallet;
  }

  async connect() {
    const answer = await this.wallet.features["standard:connect"].connect();
    const own = [...(answer?.accounts ?? []), ...(this.wallet.accounts ?? [])].find(
      (each) => typeof each?.address === "string" && each.chains?.some(isSolana),
    );
    if (!own) throw this.noAccount();
    return { id: `solana:${own.address}`, address: own.address, own };
  }

  async require(account) {
    if (!this.wallet.accounts.some((each) => each.address === account.address)) throw this.changed();
  }

  async signText(account, text) {
    const feature = this.wallet.features["solana:signMessage"];
    if (!feature) throw new Trouble(`${this.name} cannot sign messages.`);
    const message = new TextEncoder().encode(text);
    const [signed] = await feature.signMessage({ account: account.own, message });
    const bytes = signed?.signature;
    if (!(bytes instanceof Uint8Array) || bytes.length !== 64) {
      throw new Trouble(`${this.name} gave no signature.`);
    }
    const whole = signed.signedMessage;
    if (whole && !(whole.length === message.length && message.every((byte, at) => whole[at] === byte))) {
      throw new Trouble(`${this.name} signed something else than it was given.`);
    }
    return btoa(String.fromCharCode(...bytes));
  }
}

function isSolana(chain) {
  return typeof chain === "string" && chain.startsWith("solana:");
}

// Finding

/** `found(wallets)` is called with all there are, once at first and whenever there is another. */
function find(found) {
  const wallets = new Map(); // by what tells one from another
  let fallback = null;

  const all = () => found([...wallets.values(), ...(wallets.size === 0 && fallback ? [fallback] : [])]);
  const add = (key, make) => {
    if (wallets.has(key) || wallets.size >= MOST) return;
    try {
      wallets.set(key, make());
    } catch {
      return; // one that cannot even say its name
    }
    all();
  };

  addEventListener("eip6963:announceProvider", ({ detail }) => {
    const { info, provider } = detail ?? {};
    if (typeof provider?.request === "function" && info) add(provider, () => new Ethereum(provider, info));
  });
  dispatchEvent(new Event("eip6963:requestProvider"));

  const register = (...several) => {
    for (const wallet of several) {
      try {
        if (!wallet.chains.some(isSolana) || !wallet.features["standard:connect"]) continue;
      } catch {
        continue;
      }
      add(wallet, () => new Solana(wallet));
    }
    return () => {};
  };
  const api = Object.freeze({ register });
  addEventListener("wallet-standard:register-wallet", ({ detail }) => {
    if (typeof detail === "function") detail(api);
  });
  dispatchEvent(new CustomEvent("wallet-standard:app-ready", { detail: api }));

  const older = () => {
    if (fallback || typeof window.ethereum?.request !== "function") return;
    fallback = new Ethereum(window.ethereum, { name: "This browser’s wallet" });
    all();
  };
  addEventListener("ethereum#initialized", older);
  older();
  setTimeout(() => { older(); all(); }, SETTLED_MS);
}

// Offering

/**
 * Fill a place of a page with a button for each wallet: `[data-wallets]` gets the buttons, `[data-none]`
 * stands there as long as there is none. `verb` begins what a button says, `use(wallet)` is what it
 * does; `only` is the class of those that are offered.
 */
export function offer(place, verb, use, only = Wallet) {
  const list = place.querySelector("[data-wallets]");
  const none = place.querySelector("[data-none]");
  const shown = new Map();
  const began = performance.now();
  none.textContent = "Looking for wallets …";
  find((wallets) => {
    const offered = wallets.filter((wallet) => wallet instanceof only);
    for (const [wallet, button] of shown) {
      if (!offered.includes(wallet)) { button.remove(); shown.delete(wallet); }
    }
    for (const wallet of offered) {
      if (!shown.has(wallet)) {
        shown.set(wallet, drawn(verb, wallet));
        shown.get(wallet).addEventListener("click", () => use(wallet));
        list.append(shown.get(wallet));
      }
    }
    none.hidden = offered.length > 0;
    if (performance.now() - began >= SETTLED_MS) none.textContent = none.dataset.none;
  });
}

function drawn(verb, wallet) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet wallet";
  if (wallet.icon) {
    const picture = document.createElement("img");
    picture.alt = "";
    picture.src = wallet.icon;
    picture.addEventListener("error", () => picture.remove());
    button.append(picture);
  }
  const name = document.createElement("bdi"); // in whatever direction it is written
  name.textContent = wallet.name;
  const chain = document.createElement("span");
  chain.className = "soft";
  chain.textContent = wallet.chain;
  const label = document.createElement("span");
  label.append(`${verb} `, name, " ", chain);
  button.append(label);
  return button;
}

/** The line under the buttons that says how it goes. It is read aloud when it changes. */
export function say(place, text, isTrouble = false) {
  const news = place.querySelector("[data-news]");
  news.textContent = text;
  news.classList.toggle("problem", isTrouble);
}

/** A JSON answer of this server, as its status, body and time. Raises `Trouble` when none comes. */
export async function post(path, body, headers = {}) {
  let answer;
  try {
    answer = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "application/json", ...headers },
      body: typeof body === "string" ? body : JSON.stringify(body),
      credentials: "Authorization" in headers ? "omit" : "same-origin",
    });
    return { status: answer.status, body: await answer.json(), at: Date.parse(answer.headers.get("Date")) };
  } catch {
    throw new Trouble("The server did not answer. Try again.");
  }
}
