// A certified OpenID provider for the tests, on loopback and plain http.
//
// It is steered over standard input, a JSON object a line, and answers each with a line. The first:
//
//     {"port": 0, "clients": [{client metadata}], "users": {sub: {claims}}, "redirect_uris": [uri]}
//     -> {"issuer": "http://127.0.0.1:…"} once it listens
//
// Later lines may add `redirect_uris`, good for every client, and `users`, where null removes one.
// It ends when standard input does, so whoever started it cannot leave it behind.

import { generateKeyPairSync, randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { createServer } from 'node:http';
import { createInterface } from 'node:readline';
import { Provider } from 'oidc-provider';

// Standard output is for answers, and that this set-up is not for production is known.
console.info = () => {};
console.warn = () => {};

const users = new Map();
const redirectUris = new Set();

function learn({ users: changes = {}, redirect_uris: uris = [] }) {
  for (const [sub, claims] of Object.entries(changes)) {
    if (claims === null) users.delete(sub);
    else users.set(sub, claims);
  }
  for (const uri of uris) redirectUris.add(uri);
}

function say(answer) {
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}

function signingKey(kind, options, alg) {
  const { privateKey } = generateKeyPairSync(kind, options);
  return { ...privateKey.export({ format: 'jwk' }), use: 'sig', alg };
}

function makeProvider(issuer, clients) {
  const provider = new Provider(issuer, {
    clients,
    jwks: {
      keys: [
        signingKey('rsa', { modulusLength: 2048 }, 'RS256'),
        signingKey('ec', { namedCurve: 'P-256' }, 'ES256'),
      ],
    },
    cookies: { keys: [randomBytes(32).toString('hex')] },
    enabledJWA: { idTokenSigningAlgValues: ['RS256', 'ES256'] },
    pkce: { methods: ['S256'], required: () => true },
    responseTypes: ['code'],
    scopes: ['openid', 'email'],
    claims: { openid: ['sub'], email: ['email', 'email_verified'] },
    conformIdTokenClaims: false, // e-mail claims are in the ID token, as with the large providers
    features: { devInteractions: { enabled: false } },
    interactions: { url: (_, interaction) => `/interaction/${interaction.uid}` },
    findAccount: (_, sub) =>
      users.has(sub)
        ? { accountId: sub, claims: () => ({ ...users.get(sub), sub }) }
        : undefined,
    async loadExistingGrant(ctx) {
      // Signing in is consent enough, so no page asks for it.
      const grant = new provider.Grant({
        clientId: ctx.oidc.client.clientId,
        accountId: ctx.oidc.session.accountId,
      });
      grant.addOIDCScope('openid email');
      await grant.save();
      return grant;
    },
    renderError(ctx, out) {
      ctx.type = 'application/json';
      ctx.body = out;
    },
  });
  provider.Client.prototype.redirectUriAllowed = function allowed(uri) {
    return this.redirectUris.includes(uri) || redirectUris.has(uri);
  };
  provider.on('server_error', (_, error) => console.error(error));
  return provider;
}

const page = (title) => `<!doctype html>
<title>${title}</title>
<h1>${title}</h1>
<form method="post">
<input name="login" autofocus>
<button>Sign in</button>
<button name="refuse" value="1">Refuse</button>
</form>
`;

async function interact(provider, request, response) {
  await provider.interactionDetails(request, response); // throws when the page is not this browser's
  let title = 'Sign in';
  if (request.method === 'POST') {
    let body = '';
    for await (const piece of request.setEncoding('utf8')) body += piece;
    const form = new URLSearchParams(body);
    if (form.has('refuse')) {
      return provider.interactionFinished(request, response, { error: 'access_denied' });
    }
    if (users.has(form.get('login'))) {
      return provider.interactionFinished(request, response, {
        login: { accountId: form.get('login') },
      });
    }
    title = 'Nobody has that login';
    response.statusCode = 403;
  }
  response.setHeader('Content-Type', 'text/html; charset=utf-8');
  response.end(page(title));
}

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const configuration = JSON.parse((await lines.next()).value);
learn(configuration);

const server = createServer();
server.listen(configuration.port ?? 0, '127.0.0.1');
await once(server, 'listening');
const issuer = `http://127.0.0.1:${server.address().port}`;
const provider = makeProvider(issuer, configuration.clients);
const answer = provider.callback();
server.on('request', (request, response) => {
  if (!request.url.startsWith('/interaction/')) {
    answer(request, response);
    return;
  }
  interact(provider, request, response).catch((error) => {
    response.writeHead(400, { 'Content-Type': 'text/plain' }).end(String(error));
  });
});
say({ issuer });

for await (const line of lines) {
  learn(JSON.parse(line));
  say({ ok: true });
}
process.exit(0);
