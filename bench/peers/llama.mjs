// llama.mjs - llama.cpp, through npm's node-llama-cpp, over a long context. One run is one process; llama.py calls it.
//
//   node llama.mjs read   MODEL TEXT TOKENS THREADS FLASH STEPS STATE   reads, generates, saves its state to a file
//   node llama.mjs resume MODEL TEXT TOKENS THREADS FLASH STEPS STATE   loads the state, generates the first token
//
// The model has a vocabulary of bytes: token 1 is BOS, byte b is token 3 + b. Prints one JSON object. Times from the start
// of the process are counted from `started`, an environment variable (seconds since 1970) its caller sets.
import {createRequire} from "node:module";
import {readFileSync, statSync} from "node:fs";
import {pathToFileURL} from "node:url";

const require = createRequire(process.cwd() + "/"); // node_modules of the current directory
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);
const [mode, modelPath, textPath, tokens, threads, flash, steps, state] = process.argv.slice(2);
const n = Number(tokens), started = Number(process.env.started);
const now = () => performance.timeOrigin / 1e3 + performance.now() / 1e3;

const llama = await getLlama({gpu: false, build: "never", maxThreads: Number(threads), progressLogs: false, logLevel: "error"});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
    contextSize: n + Number(steps) + 64, threads: Number(threads), batchSize: 512, flashAttention: flash === "1"
});
const sequence = context.getSequence();
const text = readFileSync(textPath).subarray(0, n + Number(steps) + 1);
const ids = [1, ...Array.from(text, (b) => 3 + b)];
const out = {mode, tokens: n, threads: Number(threads), flash: flash === "1"};

// Feeds one token and waits for the next one to be chosen.
async function step(id) {
    for await (const _ of sequence.evaluate([id], {temperature: 0, yieldEogToken: true})) break;
}

if (mode === "read") {
    const begin = now();
    await sequence.evaluateWithoutGeneratingNewTokens(ids.slice(0, n));
    out.read_seconds = now() - begin;
    const times = [];
    for (let i = 0; i < Number(steps); i++) {
        const before = now();
        await step(ids[n + i]);
        times.push(now() - before);
    }
    times.sort((a, b) => a - b);
    out.step_seconds = times[Math.floor(times.length / 2)];
    out.step_p99_seconds = times[Math.floor(times.length * 0.99)];
    await sequence.saveStateToFile(state);
    out.state_bytes = statSync(state).size;
} else {
    await sequence.loadStateFromFile(state, {acceptRisk: true});
    out.loaded_seconds = now() - started;
    await step(ids[n + Number(steps)]);
    out.first_token_seconds = now() - started;
}
out.peak_rss_bytes = 1024 * Number(/VmHWM:\s+(\d+)/.exec(readFileSync("/proc/self/status", "utf8"))[1]);
console.log(JSON.stringify(out));
process.exit(0);
