import { randomUUID } from "node:crypto";
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.FAREBOX_URL + "/v1",
  apiKey: process.env.FAREBOX_KEY,
});

const { data, response } = await client.chat.completions
  .create(
    {
      model: process.env.FAREBOX_MODEL,
      messages: [{ role: "user", content: "Good morning" }],
    },
    { headers: { "Idempotency-Key": randomUUID() } },
  )
  .withResponse();
console.log(data.choices[0].message.content);
const charged = response.headers.get("x-credits-charged");
const left = response.headers.get("x-credits-remaining");
console.log(`${charged} charged, ${left} left`);

const stream = await client.chat.completions.create(
  {
    model: process.env.FAREBOX_MODEL,
    messages: [{ role: "user", content: "Good evening" }],
    stream: true,
    stream_options: { include_usage: true },
  },
  { headers: { "Idempotency-Key": randomUUID() } },
);
for await (const chunk of stream) {
  for (const choice of chunk.choices) process.stdout.write(choice.delta.content ?? "");
  if (chunk.usage) console.log(`\n${chunk.farebox.credits_charged} charged`);
}
