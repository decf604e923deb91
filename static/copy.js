// Buttons that copy what stands beside them; without scripts they stay hidden.

for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    const copied = await copy(source);
    button.textContent = copied ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}

async function copy(source) {
  try {
    await navigator.clipboard.writeText(source.textContent);
    return true;
  } catch {
    // There is no clipboard over plain HTTP (Secure Contexts): select, and try the older way.
    getSelection().selectAllChildren(source);
    return document.execCommand("copy");
  }
}
