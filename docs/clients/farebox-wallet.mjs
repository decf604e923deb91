// Sign each request to a Farebox with a wallet's key, in place of an API key (RFC 9421).
//
//   const wallet = await solanaWallet(process.env.WALLET_KEY);
//   const wallet = ethereumWallet(privateKeyToAccount(process.env.WALLET_KEY)); // of viem/accounts
//   const wallet = { id: "solana:…", sign: async (bytes) => signature }; // whatever else signs
//   const answer = await signing(wallet)(url, { method: "POST", body }); // like fetch
//   const token = await sessionToken("https://farebox.example.com", wallet);
//
// Node 18 and later, and browsers. Copy this file; it needs nothing else.

const webcrypto = globalThis.crypto ?? (await import("node:crypto")).webcrypto;
const BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
const PKCS8 = [48, 46, 2, 1, 0, 48, 5, 6, 3, 43, 101, 112, 4, 34, 4, 32]; // before an Ed25519 seed
const utf8 = (text) => new TextEncoder().encode(text);
const hex = (bytes) => bytes.reduce((text, byte) => text + byte.toString(16).padStart(2, "0"), "0x");
const base64 = (bytes) => btoa(String.fromCharCode(...new Uint8Array(bytes)));

/** A key as wallets export it (base58 of 64 bytes), or as id.json has it (an array of them). */
export async function solanaWallet(secret) {
  if (typeof secret === "string") {
    secret = secret.trim().startsWith("[") ? JSON.parse(secret) : fromBase58(secret.trim(), 64);
  }
  const seed = Uint8Array.from([...PKCS8, ...secret.slice(0, 32)]);
  const key = await webcrypto.subtle.importKey("pkcs8", seed, "Ed25519", false, ["sign"]);
  const sign = async (bytes) => new Uint8Array(await webcrypto.subtle.sign("Ed25519", key, bytes));
  return { id: `solana:${toBase58(secret.slice(32))}`, sign };
}

/** A wallet on Ethereum: an account of viem, or whatever else has its `signMessage`. */
export function ethereumWallet(account) {
  return {
    id: `eip155:${account.address}`,
    sign: async (bytes) => {
      const signed = await account.signMessage({ message: { raw: bytes } });
      return Uint8Array.from(signed.slice(2).match(/../g), (byte) => parseInt(byte, 16));
    },
  };
}

/** A `fetch` that signs what it sends. `origin`: FAREBOX_PUBLIC_URL, if reached by another address. */
export function signing(wallet, { origin, fetch = globalThis.fetch } = {}) {
  return async (input, init) => {
    const request = new Request(input, init);
    const url = new URL(request.url);
    const covered = [
      ["@method", request.method],
      ["@target-uri", (origin ?? url.origin) + url.pathname + url.search],
    ];
    const headers = new Headers(request.headers);
    const hasBody = !["GET", "HEAD"].includes(request.method);
    const body = hasBody ? await request.arrayBuffer() : undefined;
    if (body?.byteLength) {
      const digest = `sha-256=:${base64(await webcrypto.subtle.digest("SHA-256", body))}:`;
      headers.set("Content-Digest", digest);
      covered.push(["content-digest", digest]);
    }
    const nonce = base64(webcrypto.getRandomValues(new Uint8Array(18)));
    const terms =
      `(${covered.map(([name]) => `"${name}"`).join(" ")});created=${Math.floor(Date.now() / 1000)}` +
      `;nonce="${nonce}";keyid="${wallet.id}";tag="farebox"`;
    const base = [...covered, ["@signature-params", terms]];
    const lines = base.map(([name, value]) => `"${name}": ${value}`).join("\n");
    headers.set("Signature-Input", `farebox=${terms}`);
    headers.set("Signature", `farebox=:${base64(await wallet.sign(utf8(lines)))}:`);
    headers.delete("Authorization"); // an SDK's, which would count instead
    return fetch(new Request(request, { headers, body }));
  };
}

/** Sign in: a session token, for an hour. `origin` as above. */
export async function sessionToken(baseUrl, wallet, { origin, fetch = globalThis.fetch } = {}) {
  const post = async (path, value) => {
    const headers = { "Content-Type": "application/json" };
    const sent = { method: "POST", headers, body: JSON.stringify(value) };
    const answer = await fetch(new URL(path, baseUrl), sent);
    if (!answer.ok) throw new Error(`${answer.status} ${await answer.text()}`);
    return answer.json();
  };
  const { message } = await post("/api/v1/wallets/challenge", { wallet: wallet.id });
  if (!message.startsWith(`${new URL(origin ?? baseUrl).host} wants you to sign in`)) {
    throw new Error("that message signs in somewhere else");
  }
  const signed = await wallet.sign(utf8(message));
  const signature = wallet.id.startsWith("eip155:") ? hex(signed) : base64(signed);
  return (await post("/api/v1/session-tokens", { message, signature })).token;
}

function fromBase58(text, length) {
  const number = [...text].reduce((sum, letter) => sum * 58n + BigInt(BASE58.indexOf(letter)), 0n);
  return Uint8Array.from({ length }, (_, i) => Number((number >> BigInt(8 * (length - 1 - i))) & 255n));
}

function toBase58(bytes) {
  let number = [...bytes].reduce((sum, byte) => sum * 256n + BigInt(byte), 0n);
  let text = "";
  for (; number; number /= 58n) text = BASE58[number % 58n] + text;
  return "1".repeat(bytes.findIndex((byte) => byte !== 0)) + text;
}
