// Conversations in this browser's local storage, and copies of messages without the page's own markup.
window.llava = (() => {
  // logins that share a browser do not see each other's conversations
  const key = () => ["llava-conversations", window.gradio_config?.username].filter(Boolean).join(":");
  const read = () => {
    try {
      return JSON.parse(localStorage.getItem(key())) ?? [];
    } catch {
      return [];
    }
  };
  const titles = (full = false) => JSON.stringify({ titles: read().map((item) => [item.title, item.id]), full });
  const write = (items) => {
    for (let kept = items; ; kept = kept.slice(0, -1)) {
      // when the storage is full, the oldest conversations are deleted, but none for one that does not fit alone
      try {
        localStorage.setItem(key(), JSON.stringify(kept));
        return true;
      } catch {
        if (kept.length < 2) return false;
      }
    }
  };
  const plain = (text) => {
    const code = /(^|\n)(`{3,}|~{3,})[^]*?(\n\2|$)|(`+)[^`]+\4/g;
    const decode = (part) => {
      const element = document.createElement("textarea");
      element.innerHTML = part;
      return element.value;
    };
    let result = "", end = 0;
    text = text.replaceAll("\u2060", "").replace(/<(span|div) class="(model-name|note|error-card)"[^]*?<\/\1>\s*/g, "");
    for (const found of text.matchAll(code)) {
      result += decode(text.slice(end, found.index)) + found[0];
      end = found.index + found[0].length;
    }
    return (result + decode(text.slice(end))).trim();
  };
  if (navigator.clipboard) {
    const copy = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => copy(plain(text));
  }
  // Names and roles for screen readers, where Gradio's are missing or are the source of a message.
  const label = () => {
    for (const image of document.querySelectorAll("img:not([alt])")) image.alt = "";
    for (const list of document.querySelectorAll(".examples[role=list]")) list.setAttribute("role", "group");
    for (const copy of document.querySelectorAll("[aria-hidden=true] > button:not([tabindex])")) copy.tabIndex = -1;
    for (const [id, name] of [["history", "Conversations"], ["settings", "Settings"]])
      document.querySelector(`#${id} .toggle-button:not([title])`)?.setAttribute("title", name);
    for (const button of document.querySelectorAll('.toggle-button[aria-label="Toggle Sidebar"][title]'))
      button.setAttribute("aria-label", button.title);
    for (const message of document.querySelectorAll(".message > [aria-label*='message: ']"))
      if (/[<&]/.test(message.ariaLabel)) message.setAttribute("aria-label", message.innerText);
  };
  new MutationObserver(label).observe(document.documentElement, { childList: true, subtree: true });
  return {
    titles,
    plain,
    store: (text) => {
      if (!text) return titles();
      const item = JSON.parse(text);
      return titles(!write([item, ...read().filter((other) => other.id !== item.id)]));
    },
    find: (id) => JSON.stringify(read().find((item) => item.id === id) ?? null),
    remove: (id) => {
      write(read().filter((item) => item.id !== id));
      return titles();
    },
    save: (text) => {
      if (!text) return;
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
      link.download = "conversation.json";
      link.click();
      URL.revokeObjectURL(link.href);
    },
  };
})();
