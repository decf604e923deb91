// What the official JavaScript client makes of a Farebox: one JSON object, a scene each, for the
// Python test that called it. It is told where to ask and what as JSON on the command line.

import OpenAI from "openai";

const told = JSON.parse(process.argv[2]);

let requests = 0;
const counting = (...asked) => {
  requests += 1;
  return fetch(...asked);
};
const clientOf = (options) =>
  new OpenAI({ baseURL: told.url, apiKey: told.key, fetch: counting, ...options });
const client = clientOf({});
const asking = (text, more = {}) => ({
  model: told.model,
  messages: [{ role: "user", content: text }],
  ...more,
});

async function heard(stream) {
  const found = { text: "", said: [], tools: "", usages: [], farebox: null };
  for await (const chunk of stream) {
    for (const choice of chunk.choices) {
      found.text += choice.delta.content ?? "";
      if (choice.delta.content) found.said.push(choice.delta.content);
      for (const call of choice.delta.tool_calls ?? []) found.tools += call.function.arguments;
    }
    if (chunk.usage) found.usages.push(chunk.usage);
    found.farebox ??= chunk.farebox ?? null;
  }
  return found;
}

// What an attempt was refused with, as a program would see it, and how many requests it took.
async function refused(attempt) {
  requests = 0;
  try {
    await attempt();
  } catch (error) {
    return {
      kind: error.constructor.name,
      isApiError: error instanceof OpenAI.APIError,
      status: error.status ?? null,
      code: error.code ?? null,
      type: error.type ?? null,
      retryAfter: error.headers?.get("retry-after") ?? null,
      hasId: Boolean(error.requestID),
      requests,
    };
  }
  return { kind: "none", requests };
}

const scenes = {
  async list() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    return { ids, one: await client.models.retrieve(told.model) };
  },

  async chat() {
    const asked = client.chat.completions.create(asking("good day"));
    const { data, response, request_id } = await asked.withResponse();
    return {
      text: data.choices[0].message.content,
      model: data.model,
      usage: data.usage,
      charged: response.headers.get("x-credits-charged"),
      id: request_id,
    };
  },

  async choices() {
    const answer = await client.chat.completions.create(asking("good day", { n: 3 }));
    return { texts: answer.choices.map((choice) => choice.message.content), id: answer._request_id };
  },

  async stream() {
    return heard(await client.chat.completions.create(asking("good day", { stream: true })));
  },

  async streamWithUsage() {
    const more = { stream: true, stream_options: { include_usage: true } };
    const asked = client.chat.completions.create(asking("good day", more));
    const { data, response, request_id } = await asked.withResponse();
    return { ...(await heard(data)), held: response.headers.get("x-credits-held"), id: request_id };
  },

  async tools() {
    const tools = [{ type: "function", function: { name: "weather", parameters: {} } }];
    const whole = await client.chat.completions.create(asking("weather?", { tools }));
    const parts = await client.chat.completions.create(asking("weather?", { tools, stream: true }));
    return {
      whole: whole.choices[0].message.tool_calls[0].function,
      parts: (await heard(parts)).tools,
    };
  },

  async completion() {
    const answer = await client.completions.create({ model: told.model, prompt: "good day" });
    return answer.choices[0].text;
  },

  async embedding() {
    const answer = await client.embeddings.create({ model: told.model, input: ["one", "two"] });
    return answer.data.map((item) => item.embedding);
  },

  async errors() {
    const key = (apiKey) => clientOf({ apiKey }).chat.completions;
    const cases = {
      AuthenticationError: () => key("fare_live_nobody").create(asking("hi")),
      PermissionDeniedError: () => key(told.otherModelsKey).create(asking("hi")),
      NotFoundError: () => client.chat.completions.create(asking("hi", { model: "no-such" })),
      BadRequestError: () => client.chat.completions.create(asking("hi", { max_tokens: -1 })),
      APIError: () => key(told.poorKey).create(asking("hi")),
      UnprocessableEntityError: async () => {
        const headers = { "Idempotency-Key": "used-twice" };
        await client.chat.completions.create(asking("one"), { headers });
        requests = 0;
        await client.chat.completions.create(asking("other"), { headers });
      },
      RateLimitError: () => client.chat.completions.create(asking(told.busy), { maxRetries: 0 }),
      InternalServerError: () =>
        client.chat.completions.create(asking(told.failing), { maxRetries: 0 }),
    };
    const found = {};
    for (const [name, attempt] of Object.entries(cases)) found[name] = await refused(attempt);
    return found;
  },

  async retry() {
    requests = 0;
    const answer = await client.chat.completions.create(asking(told.failingOnce));
    return { text: answer.choices[0].message.content, requests };
  },

  async lostAnswer() {
    requests = 0;
    const headers = { "Idempotency-Key": "lost-on-the-way" };
    const asked = clientOf({ baseURL: told.lossyUrl }).chat.completions;
    const { data, response } = await asked.create(asking("is it lost"), { headers }).withResponse();
    return {
      text: data.choices[0].message.content,
      charged: response.headers.get("x-credits-charged"),
      replayed: response.headers.get("idempotent-replayed"),
      requests,
    };
  },

  async broken() {
    return refused(async () => heard(await client.chat.completions.create(
      asking(told.cut, { stream: true }),
    )));
  },
};

const found = {};
for (const [name, scene] of Object.entries(scenes)) found[name] = await scene();
console.log(JSON.stringify(found));
