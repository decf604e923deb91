// Sign in with a wallet, or link one: it signs our message, and the form that is there sends it.

import { Trouble, offer, post, say } from "/static/wallets.js";

const place = document.getElementById("wallet-form");
const form = place.querySelector("form");
let latest = 0; // whoever presses again begins anew, and what came of the one before is let go

async function begin(wallet) {
  latest += 1;
  const mine = latest;
  const step = async (doing) => {
    const done = await doing;
    if (mine !== latest) throw new Trouble("");
    return done;
  };
  try {
    say(place, `Waiting for ${wallet.name}: answer there.`);
    const account = await step(wallet.connect());
    const asked = await step(post("/api/v1/wallets/challenge", { wallet: account.id }));
    if (asked.status !== 200) throw new Trouble(asked.body.message ?? "The server refused. Try again.");
    const { message } = asked.body;
    say(place, `Waiting for ${wallet.name}: sign the message there. It costs nothing.`);
    const signature = await step(wallet.signText(account, message));
    await step(wallet.require(account));
    form.elements.message.value = message;
    form.elements.signature.value = signature;
    say(place, "Signed. One moment …");
    form.submit();
  } catch (error) {
    if (mine === latest) say(place, wallet.words(error), true);
  }
}

offer(place, place.dataset.verb, begin);
