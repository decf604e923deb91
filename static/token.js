// The session token of an open page: how long it has left, and another one before it ends.
//
// It is renewed with itself and not with the cookie, so a page left open does not keep the sign-in
// from falling idle.

const RENEW_MS = 5 * 60 * 1000; // before its end
const card = document.getElementById("token-card");
const token = document.getElementById("token");
const left = document.getElementById("token-left");
const news = document.getElementById("token-news");
// By this browser’s own clock, which may be wrong; how long is left is not.
let expires = Date.now() + Number(card.dataset.left);
let renewing = false;
let retryAt = 0;

function tick() {
  const ms = expires - Date.now();
  const minutes = Math.floor(ms / 60000);
  const seconds = Math.floor((ms % 60000) / 1000);
  left.textContent = ms > 0 ? `, ${minutes}:${String(seconds).padStart(2, "0")} left` : ", ended";
  if (ms > 0 && ms < RENEW_MS && !renewing && Date.now() >= retryAt) renew();
}

async function renew() {
  renewing = true;
  try {
    const answer = await fetch("/api/v1/session-tokens", {
      method: "POST",
      headers: { Authorization: `Bearer ${token.textContent}`, "Content-Type": "application/json" },
      body: "{}",
      credentials: "omit",
    });
    if (answer.ok) {
      show(await answer.json());
    } else if (answer.status === 401 || answer.status === 403) {
      news.textContent = "It has ended, and so has the sign-in or the membership behind it.";
      expires = Math.min(expires, Date.now());
    } else {
      retryAt = Date.now() + 15000;
    }
  } catch {
    retryAt = Date.now() + 15000;
  } finally {
    renewing = false;
  }
}

function show(made) {
  const before = expires;
  token.textContent = made.token;
  const { jti, iat, exp } = claims(made.token);
  expires = Date.now() + (exp - iat) * 1000;
  document.getElementById("token-id").value = jti;
  const time = card.querySelector("time");
  time.dateTime = made.expires_at;
  time.textContent = `${made.expires_at.slice(0, 16).replace("T", " ")} UTC`;
  news.textContent = "Renewed; the one before goes on until its own end.";
  if (expires <= before + 1000) retryAt = Infinity; // the sign-in itself ends then
}

function claims(jwt) {
  return JSON.parse(atob(jwt.split(".")[1].replaceAll("-", "+").replaceAll("_", "/")));
}

tick();
setInterval(tick, 1000);
