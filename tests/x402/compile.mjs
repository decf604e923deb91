// Makes FiatToken.json of FiatToken.sol. It is for whoever changes the contract; the tests read the
// JSON. In a folder of its own: npm install solc@0.8.37, and node compile.mjs THIS_FOLDER.
import { createRequire } from "node:module";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const folder = process.argv[2];
const solc = createRequire(join(process.cwd(), "any.js"))("solc");
const made = JSON.parse(solc.compile(JSON.stringify({
  language: "Solidity",
  sources: { "FiatToken.sol": { content: readFileSync(join(folder, "FiatToken.sol"), "utf-8") } },
  settings: {
    evmVersion: "cancun",
    viaIR: true,
    optimizer: { enabled: true, runs: 200 },
    metadata: { bytecodeHash: "none", appendCBOR: false },
    outputSelection: { "*": { "*": ["abi", "evm.deployedBytecode.object", "evm.methodIdentifiers"] } },
  },
})));
for (const { formattedMessage } of made.errors ?? []) console.error(formattedMessage);
const { abi, evm } = made.contracts["FiatToken.sol"].FiatToken;
writeFileSync(join(folder, "FiatToken.json"), JSON.stringify({
  compiler: `solc ${solc.version()}`,
  selectors: evm.methodIdentifiers,
  runtime: "0x" + evm.deployedBytecode.object,
  abi,
}, null, 1) + "\n");
