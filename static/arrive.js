// First steps: look for the first call, and show it as soon as it is there.

const EVERY_MS = 3000;
const MOST = 200; // looks, which is ten minutes: a page that is forgotten does not ask for ever
const waiting = document.getElementById("waiting");
let looks = 0;

async function look() {
  if (document.visibilityState === "visible") {
    looks += 1;
    try {
      const answer = await fetch("/dashboard", { redirect: "manual" });
      if (answer.ok && !(await answer.text()).includes('id="first-steps"')) {
        location.reload();
        return;
      }
    } catch {
      // The server is away for a moment; the next look will tell.
    }
  }
  if (looks < MOST) setTimeout(look, EVERY_MS);
  else waiting.textContent = "Load this page again once the call is answered.";
}

waiting.textContent = "Waiting for your first call …";
setTimeout(look, EVERY_MS);
