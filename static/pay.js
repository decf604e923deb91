// Pay with wallet: sign a transfer of USDC in the browser, and send it for credits.
//
// Money goes at most once. What was signed is kept before it is sent, and as long as nobody knows
// what became of it, there is nothing else to press than to send the very same again.

import { Ethereum, Trouble, offer, post, say } from "/static/wallets.js";

const TOP_UP = "/api/v1/credits/top-up";
const TYPES = {
  EIP712Domain: [
    { name: "name", type: "string" },
    { name: "version", type: "string" },
    { name: "chainId", type: "uint256" },
    { name: "verifyingContract", type: "address" },
  ],
  TransferWithAuthorization: [
    { name: "from", type: "address" },
    { name: "to", type: "address" },
    { name: "value", type: "uint256" },
    { name: "validAfter", type: "uint256" },
    { name: "validBefore", type: "uint256" },
    { name: "nonce", type: "bytes32" },
  ],
};
const UNPAID = {
  expired: "It took too long to sign.",
  insufficient: "The wallet has too little USDC on this network.",
};

const place = document.getElementById("pay");
const amount = document.getElementById("pay-credits");
const network = document.getElementById("pay-network");
const price = document.getElementById("pay-price");
const list = place.querySelector("[data-wallets]");
const unsure = document.getElementById("pay-unsure");
const again = document.getElementById("pay-again");
const stop = document.getElementById("pay-stop");
const account = place.dataset.account;
const unitsPerCredit = BigInt(place.dataset.units);
const slot = `farebox-payment-${account}`; // a payment of one account is no other's to send
let signing = 0; // the number of the attempt that a wallet is at; 0 for none
let attempts = 0;
let sending = false;
let first = false; // what is being sent is sent for the first time
let kept = restored(); // the payment of which nobody knows yet what became of it

// What is kept

function restored() {
  try {
    const found = JSON.parse(sessionStorage.getItem(slot));
    return found && typeof found.header === "string" ? found : null;
  } catch {
    return null;
  }
}

function keep(payment) {
  kept = payment;
  try {
    if (payment) sessionStorage.setItem(slot, JSON.stringify(payment));
    else sessionStorage.removeItem(slot);
  } catch {
    // Then it is kept as long as this page is open.
  }
}

// What is shown

function counted(credits) {
  return `${Number(credits).toLocaleString("en-US")} credit${Number(credits) === 1 ? "" : "s"}`;
}

function usdc(units) {
  const text = String(units).padStart(7, "0");
  const cents = text.slice(-6).replace(/0{1,4}$/, "");
  return `${Number(text.slice(0, -6)).toLocaleString("en-US")}.${cents} USDC`;
}

function wanted() {
  const credits = amount.value.trim();
  const is = /^[0-9]{1,12}$/.test(credits) ? Number(credits) : NaN;
  return is >= Number(amount.min) && is <= Number(amount.max) ? is : null;
}

function title() {
  return network.selectedOptions ? network.selectedOptions[0].textContent : network.dataset.title;
}

function show() {
  const credits = wanted();
  price.textContent = credits === null ? "–" : usdc(BigInt(credits) * unitsPerCredit);
  const busy = signing > 0 || sending;
  for (const button of [...list.children, again]) button.ariaDisabled = String(busy || (button !== again && kept !== null));
  amount.readOnly = busy || kept !== null;
  stop.hidden = signing === 0;
  unsure.hidden = again.hidden = kept === null || (sending && first);
  if (kept) {
    unsure.querySelector("span").textContent =
      `A payment of ${usdc(kept.units)} on ${kept.title} for ${counted(kept.credits)} is signed, and whether it went through is not known. Do not pay again: send the same payment again, which is never taken twice.`;
  }
}

// Paying

async function pay(wallet) {
  if (signing || sending || kept) return;
  const credits = wanted();
  amount.setAttribute("aria-invalid", String(credits === null));
  if (credits === null) {
    say(place, `Choose a whole number of credits from ${Number(amount.min).toLocaleString("en-US")} to ${Number(amount.max).toLocaleString("en-US")}.`, true);
    amount.focus();
    return;
  }
  attempts += 1;
  const mine = attempts;
  signing = mine;
  show();
  let signed = null;
  try {
    signed = await sign(wallet, credits, async (doing) => {
      const done = await doing;
      if (signing !== mine) throw new Trouble("");
      return done;
    });
  } catch (error) {
    if (signing === mine) say(place, wallet.words(error), true);
  }
  if (signing !== mine) return; // given up meanwhile: what was signed after that is never sent
  signing = 0;
  if (signed) {
    keep(signed.payment);
    first = true;
    await send(signed.token);
    first = false;
  }
  show();
}

async function sign(wallet, credits, step) {
  const chosen = network.value ?? network.dataset.network;
  const chain = BigInt(chosen.split(":")[1]);
  const on = title();
  say(place, `Waiting for ${wallet.name}: answer there.`);
  const payer = await step(wallet.connect());
  await step(wallet.switchTo(chain, on));
  const token = await step(minted());
  const body = JSON.stringify({ credits });
  const asked = await step(post(TOP_UP, body, { Authorization: `Bearer ${token}` }));
  const terms = asked.status === 402 ? asked.body.accepts?.find((each) => each.network === chosen) : null;
  const units = BigInt(credits) * unitsPerCredit;
  if (asked.status !== 402) throw new Trouble(asked.body.message ?? "The server refused. Try again.");
  if (!terms) throw new Trouble(`Nothing can be paid on ${on} just now.`);
  if (terms.amount !== String(units)) throw new Trouble("The price has changed. Load this page again.");
  const from = Number.isNaN(asked.at) ? Date.now() : asked.at; // by the server's clock, if it tells
  const authorization = {
    from: payer.address,
    to: terms.payTo,
    value: terms.amount,
    validAfter: "0",
    validBefore: String(Math.floor(from / 1000) + terms.maxTimeoutSeconds),
    nonce: `0x${Array.from(crypto.getRandomValues(new Uint8Array(32)), (byte) => byte.toString(16).padStart(2, "0")).join("")}`,
  };
  const number = Number(chain);
  await step(wallet.require(payer));
  await step(wallet.requireOn(chain, on));
  say(place, `Waiting for ${wallet.name}: sign the payment of ${usdc(units)} there, within ${Math.floor(terms.maxTimeoutSeconds / 60)} minutes.`);
  const signature = await step(wallet.signTyped(payer, {
    types: TYPES,
    primaryType: "TransferWithAuthorization",
    domain: {
      name: terms.extra.name,
      version: terms.extra.version,
      chainId: Number.isSafeInteger(number) ? number : String(chain),
      verifyingContract: terms.asset,
    },
    message: authorization,
  }));
  await step(wallet.require(payer));
  const payment = { x402Version: 2, accepted: terms, payload: { authorization, signature }, resource: asked.body.resource };
  return {
    token,
    payment: { header: encoded(payment), body, credits, units: String(units), title: on, unsure: false },
  };
}

function encoded(value) {
  return btoa(String.fromCharCode(...new TextEncoder().encode(JSON.stringify(value))));
}

async function minted() {
  const csrf = document.querySelector('input[name="csrf_token"]').value;
  const answer = await post("/api/v1/session-tokens", { account }, { "X-CSRF-Token": csrf });
  if (answer.status === 201) return answer.body.token;
  throw new Trouble(
    [401, 403, 404].includes(answer.status)
      ? "You are signed out, or not in this account any more. Sign in, and load this page again."
      : (answer.body.message ?? "The server refused. Try again."),
  );
}

// Sending, once or again

async function send(token = null) {
  sending = true;
  show();
  const payment = kept;
  try {
    say(place, "Paying … This takes some seconds.");
    const bearer = token ?? (await minted());
    const wasUnsure = payment.unsure;
    keep({ ...payment, unsure: true }); // whatever happens from here on
    const answer = await post(TOP_UP, payment.body, {
      Authorization: `Bearer ${bearer}`,
      "PAYMENT-SIGNATURE": payment.header,
    });
    conclude(answer, payment, wasUnsure);
  } catch (error) {
    const told = error instanceof Trouble ? error.message : "Something went wrong on this page.";
    say(place, `${told} Do not pay again: send the same payment again.`, true);
  } finally {
    sending = false;
    show();
    if (kept) again.focus();
  }
}

function conclude({ status, body }, payment, wasUnsure) {
  const code = body.error;
  if (status === 200 && body.success === true) {
    keep(null);
    const left = document.getElementById("balance-now");
    left.firstChild.textContent = `${Number(body.credits).toLocaleString("en-US")} `;
    say(place, `Added ${counted(body.creditsAdded)} for ${usdc(payment.units)}. The balance is ${counted(body.credits)}. Load this page again to see it in the ledger.`);
    return;
  }
  if (code === "payment_invalid") {
    keep(null);
    const why = /insufficient|balance/i.test(body.reason ?? "") ? UNPAID.insufficient : (UNPAID[body.reason] ?? body.message);
    say(place, `Not paid, and no money moved. ${why}`, true);
  } else if (code === "payment_already_used") {
    keep(null);
    say(place, "This payment was taken before. What it bought is in the ledger below, once this page is loaded again.", true);
  } else if ([400, 401, 403, 404].includes(status) && !wasUnsure) {
    keep(null);
    say(place, `Not paid, and no money moved. ${body.message ?? ""}`, true);
  } else if (code === "payment_in_progress") {
    say(place, "It is being settled. Send the same payment again in a moment.", true);
  } else {
    say(place, `${body.message ?? "The server failed."} Do not pay again: send the same payment again.`, true);
  }
}

again.addEventListener("click", () => { if (kept && !sending && !signing) send(); });
stop.addEventListener("click", () => {
  signing = 0;
  say(place, "Given up. Nothing was paid; what the wallet still asks can be refused there.");
  show();
});
amount.addEventListener("input", () => { amount.setAttribute("aria-invalid", String(wanted() === null)); show(); });

document.getElementById("pay-fields").hidden = false;
offer(place, "Pay with", pay, Ethereum);
new MutationObserver(show).observe(list, { childList: true });
show();
