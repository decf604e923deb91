// What the client of docs/clients and independent libraries make of a Farebox, as JSON, for
// test_wallet_clients.py. The keys are told; who signs is told apart by name.
import httpMessageSignatures from "http-message-signatures";
import { createHash, randomUUID } from "node:crypto";
import nacl from "tweetnacl";
import { privateKeyToAccount } from "viem/accounts";
import {
  ethereumWallet,
  sessionToken,
  signing,
  solanaWallet,
} from "../../docs/clients/farebox-wallet.mjs";

const told = JSON.parse(process.argv[2]);
const { url } = told;
const secret = Uint8Array.from(told.solana.array);
const account = privateKeyToAccount(told.ethereum.key);
const wallets = {
  solanaText: await solanaWallet(told.solana.text),
  solanaArray: await solanaWallet(told.solana.array),
  solanaFile: await solanaWallet(JSON.stringify(told.solana.array)),
  tweetnacl: {
    id: told.solana.id,
    sign: async (bytes) => nacl.sign.detached(bytes, secret),
  },
  viem: ethereumWallet(account),
};
const text = { to: "+18148835337", message: "hi" };
const json = { "Content-Type": "application/json" };

async function scenes(wallet) {
  const signed = signing(wallet);
  const token = await sessionToken(url, wallet);
  const headers = { Authorization: `Bearer ${token}` };
  const signedIn = await (await fetch(`${url}/api/v1/account`, { headers })).json();
  const before = await (await signed(`${url}/api/v1/account`)).json();
  const sent = { method: "POST", headers: json, body: JSON.stringify(text) };
  const paid = await signed(`${url}/api/v1/sms/send`, sent);
  const odd = await signed(new Request(`${url}/api/v1/up/ok/a%20b/%C3%BC?x=1&y=a+b%26&z#part`));
  const bare = await signed(`${url}/api/v1/up/ok/a?`);
  const deleted = await signed(`${url}/api/v1/up/ok/gone`, { method: "DELETE" });
  const stream = await signed(`${url}/api/v1/up/sse/3`);
  const repeated = {
    ...sent,
    headers: { ...json, "Idempotency-Key": `again-${wallet.id}`, Authorization: "Bearer unused" },
  };
  const first = await signed(`${url}/api/v1/sms/send`, repeated);
  const second = await signed(`${url}/api/v1/sms/send`, repeated);
  const elsewhere = signing(wallet, { origin: "https://elsewhere.example.com" });
  const refused = await elsewhere(`${url}/api/v1/account`);
  return {
    id: wallet.id,
    signedIn,
    before: before.credits,
    paid: { status: paid.status, charged: paid.headers.get("x-credits-charged"), body: await paid.json() },
    odd: await odd.json(),
    bare: bare.status,
    deleted: deleted.status,
    stream: await stream.text(),
    again: [first.status, second.status, second.headers.get("idempotent-replayed")],
    same: (await first.text()) === (await second.text()),
    refused: [refused.status, (await refused.json()).error],
  };
}

// A library that knows nothing of us writes the base and the headers.
async function library(id, alg, sign) {
  const body = JSON.stringify(text);
  const digest = createHash("sha512").update(body).digest("base64");
  const request = {
    method: "POST",
    url: `${url}/api/v1/sms/send?of=the-library`,
    headers: { ...json, "Content-Digest": `sha-512=:${digest}:` },
  };
  const made = await httpMessageSignatures.httpbis.signMessage(
    {
      key: { id, alg, sign: async (data) => Buffer.from(await sign(data)) },
      fields: ["@method", "@target-uri", "@authority", "content-type", "content-digest"],
      params: ["keyid", "alg", "created", "expires", "nonce", "tag"],
      paramValues: { nonce: randomUUID(), tag: "farebox" },
    },
    request,
  );
  const answer = await fetch(request.url, { method: "POST", headers: made.headers, body });
  const again = await fetch(request.url, { method: "POST", headers: made.headers, body });
  return [answer.status, again.status, (await again.json()).error];
}

async function elsewhere(wallet) {
  try {
    await sessionToken(url, wallet, { origin: "https://elsewhere.example.com" });
    return "signed";
  } catch (error) {
    return error.message;
  }
}

const found = { elsewhere: await elsewhere(wallets.viem) };
for (const name of ["solanaText", "tweetnacl", "viem"]) found[name] = await scenes(wallets[name]);
found.forms = [wallets.solanaArray.id, wallets.solanaFile.id];
found.aSignature = await signing(wallets.solanaArray)(`${url}/api/v1/account`).then((a) => a.status);
found.libraries = {
  tweetnacl: await library(told.solana.id, "ed25519", (data) => nacl.sign.detached(data, secret)),
  viem: await library(`eip155:${account.address}`, "eip191", async (data) => {
    const signed = await account.signMessage({ message: { raw: data } });
    return Buffer.from(signed.slice(2), "hex");
  }),
};
console.log(JSON.stringify(found));
