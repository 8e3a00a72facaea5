// The program that the embedding examples fork. Its boot takes a second, as a real one's would; then it greets whoever
// writes a name to its stdin, and ends.
import { createInterface } from 'node:readline'
import { setTimeout } from 'node:timers/promises'

await setTimeout(1000)
const greetings = ['Good morning', 'Good day', 'Good evening']
console.log('ready')

for await (const name of createInterface({ input: process.stdin })) {
  for (const greeting of greetings) console.log(`${greeting}, ${name}!`)
}
