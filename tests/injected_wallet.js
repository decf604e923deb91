// Wallets in a page, as their extensions put them there. `injectedWallets` says which, and
// `askWallet` asks the test, which has their keys.

for (const wallet of window.injectedWallets) {
  const ask = async (method, params = null) => {
    const answer = await window.askWallet(wallet.number, method, params);
    if (answer.error) throw Object.assign(new Error(answer.error.message), answer.error);
    return answer.result;
  };

  const begin = {
    announced: () => {
      const provider = Object.freeze({ request: ({ method, params }) => ask(method, params) });
      const info = Object.freeze({ uuid: crypto.randomUUID(), name: wallet.name, icon: wallet.icon, rdns: "test.wallet" });
      const detail = Object.freeze({ info, provider });
      const announce = () => dispatchEvent(new CustomEvent("eip6963:announceProvider", { detail }));
      addEventListener("eip6963:requestProvider", announce);
      announce();
      announce(); // as some do, to be sure
    },
    window: () => {
      window.ethereum = { request: ({ method, params }) => ask(method, params) };
      dispatchEvent(new Event("ethereum#initialized"));
    },
    standard: () => {
      const accounts = (addresses) =>
        addresses.map((address) => ({ address, publicKey: new Uint8Array(32), chains: wallet.chains, features: [] }));
      const own = {
        version: "1.0.0",
        name: wallet.name,
        icon: wallet.icon,
        chains: wallet.chains,
        accounts: [],
        features: {
          "standard:connect": {
            version: "1.0.0",
            connect: async () => {
              own.accounts = accounts(await ask("connect"));
              return { accounts: own.accounts };
            },
          },
        },
      };
      if (wallet.signs) {
        own.features["solana:signMessage"] = {
          version: "1.1.0",
          signMessage: async (...inputs) => Promise.all(inputs.map(async ({ account, message }) => {
            const [signature, signed, addresses] = await ask("signMessage", [account.address, [...message]]);
            own.accounts = accounts(addresses);
            return { signature: new Uint8Array(signature), signedMessage: new Uint8Array(signed) };
          })),
        };
      }
      const callback = (api) => api.register(own);
      addEventListener("wallet-standard:app-ready", ({ detail }) => callback(detail));
      dispatchEvent(new CustomEvent("wallet-standard:register-wallet", { detail: callback }));
    },
  }[wallet.kind];

  if (wallet.isLate) window[`arrive${wallet.number}`] = begin;
  else begin();
}
