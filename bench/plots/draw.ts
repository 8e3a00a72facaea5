/**
 * Draws what `warmth --curves FILE` wrote: latency of a child's first requests, and its private memory, by generation.
 *
 *     npx tsx bench/plots/draw.ts FILE [DIRECTORY]
 *
 * SVG by hand: a library would be larger than this. No background, and colours of middling lightness, so that both can be read on
 * light pages and on dark ones.
 */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { Curve } from '../warmth.js'

type Panels = ReadonlyArray<readonly [runtime: string, curves: readonly Curve[]]>

const WIDTH = 440
const LEFT = 52
const RIGHT = 96
const TOP = 44
const FONT = 'font-family="system-ui, sans-serif" font-size="12"'
const GREY = '#7a7a7a'
/** A line's points, closer together at the beginning, where a child changes most: each the median up to the next. */
const STEPS = [1, 2, 3, 4, 5, 7, 10, 15, 22, 33, 50, 75, 110, 160, 240, 360]
const NAMES: Readonly<Record<string, string>> = { jruby: 'JRuby', node: 'Node' }

function latency(panels: Panels): string {
  const bottom = 320
  const drawn = panels.map(([runtime, curves], panel) => {
    const lines = curves.map(({ generation, latencies }) => ({ generation, points: medians(latencies) }))
    const values = lines.flatMap(({ points }) => points.map(({ ms }) => ms))
    const ticks = logTicks(Math.min(...values), Math.max(...values))
    const requests = Math.max(...curves.map(({ latencies }) => latencies.length))
    const x = scale([Math.log(1), Math.log(requests)], [LEFT, WIDTH - RIGHT])
    const y = scale([Math.log(ticks[0]!), Math.log(ticks.at(-1)!)], [bottom, TOP])
    const ends = spread(lines.map(({ points }) => y(Math.log(points.at(-1)!.ms))))
    return group(panel, [
      heading(`${NAMES[runtime] ?? runtime}: milliseconds a request`),
      ...ticks.map((ms) => rule(LEFT, y(Math.log(ms)), WIDTH - RIGHT) + text(LEFT - 6, y(Math.log(ms)) + 4, ms, 'end')),
      ...[1, 10, 100, requests].map((n) => text(x(Math.log(n)), bottom + 18, n, 'middle')),
      text((LEFT + WIDTH - RIGHT) / 2, bottom + 38, 'request of the child', 'middle'),
      ...lines.map(({ generation, points }, i) => {
        const path = points.map(({ request, ms }) => `${fixed(x(Math.log(request)))},${fixed(y(Math.log(ms)))}`)
        const color = colorOf(i, lines.length)
        const leader = `${path.at(-1)} ${WIDTH - RIGHT + 10},${fixed(ends[i]!)}`
        return [
          `<polyline points="${path.join(' ')}" fill="none" stroke="${color}" stroke-width="2" stroke-linejoin="round"/>`,
          `<polyline points="${leader}" fill="none" stroke="${color}" stroke-dasharray="2 2"/>`,
          text(WIDTH - RIGHT + 14, ends[i]! + 4, `generation ${generation}`, 'start', color),
        ].join('')
      }),
    ])
  })
  return svg(panels.length, bottom + 50, "Latency of a child's first requests, by generation", drawn)
}

function memory(panels: Panels): string {
  const most = Math.max(...panels.map(([, curves]) => curves.length))
  const drawn = panels.map(([runtime, curves], panel) => {
    const x = scale([0, Math.max(...curves.map(({ privateMiB }) => privateMiB))], [0, WIDTH - RIGHT - 110])
    const requests = Math.max(...curves.map(({ latencies }) => latencies.length))
    return group(panel, [
      heading(`${NAMES[runtime] ?? runtime}: private MiB of a child after ${requests} requests`),
      ...curves.map(({ generation, privateMiB }, i) => {
        const y = TOP + i * 26
        const bar = `<rect x="110" y="${y}" width="${fixed(x(privateMiB))}" height="18" fill="${colorOf(i, curves.length)}"/>`
        const value = `${privateMiB.toFixed(1)} MiB`
        return (
          text(102, y + 13, `generation ${generation}`, 'end') + bar + text(116 + x(privateMiB), y + 13, value, 'start')
        )
      }),
    ])
  })
  return svg(panels.length, TOP + most * 26 + 8, 'Private memory of a child, by generation', drawn)
}

function medians(latencies: readonly number[]) {
  return STEPS.filter((step) => step <= latencies.length).map((request, i, steps) => {
    const part = latencies.slice(request - 1, (steps[i + 1] ?? latencies.length + 1) - 1).sort((a, b) => a - b)
    // The last point stands at the end, so that the line reaches it.
    return {
      request: i === steps.length - 1 ? latencies.length : request,
      ms: part[Math.floor((part.length - 1) / 2)]!,
    }
  })
}

/** 1, 2 and 5 times powers of ten, around both. */
function logTicks(least: number, most: number): number[] {
  const all = [-2, -1, 0, 1, 2, 3, 4].flatMap((power) => [1, 2, 5].map((digit) => Number(`${digit}e${power}`)))
  const from = Math.max(
    0,
    all.findLastIndex((tick) => tick <= least),
  )
  return all.slice(from, all.findIndex((tick) => tick > most && tick > all[from]!) + 1)
}

/** Places for labels, at least 15 apart, in the order of what they belong to. */
function spread(places: readonly number[]): number[] {
  const order = places.map((place, i) => ({ place, i })).sort((a, b) => b.place - a.place)
  const out: number[] = []
  let last = Number.POSITIVE_INFINITY
  for (const { place, i } of order) {
    last = Math.min(place, last - 15)
    out[i] = last
  }
  return out
}

/** From blue, the coldest, to red. */
function colorOf(i: number, count: number): string {
  return `hsl(${Math.round(210 + (count > 1 ? (i / (count - 1)) * 150 : 0)) % 360},65%,60%)`
}

const scale =
  ([a, b]: readonly [number, number], [from, to]: readonly [number, number]) =>
  (value: number) =>
    from + ((value - a) / (b - a)) * (to - from)
const fixed = (value: number) => Number(value.toFixed(1))
const group = (panel: number, parts: readonly string[]) =>
  `<g transform="translate(${panel * WIDTH},0)">\n${parts.join('\n')}\n</g>`
const rule = (x: number, y: number, to: number) =>
  `<line x1="${x}" x2="${to}" y1="${fixed(y)}" y2="${fixed(y)}" stroke="${GREY}" stroke-opacity="0.3"/>`
const text = (x: number, y: number, words: string | number, anchor: string, fill = GREY) =>
  `<text x="${fixed(x)}" y="${fixed(y)}" text-anchor="${anchor}" fill="${fill}">${words}</text>`
const heading = (words: string) => `<text x="8" y="20" font-weight="600" fill="${GREY}">${words}</text>`

function svg(panels: number, height: number, title: string, drawn: readonly string[]): string {
  const open = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${panels * WIDTH} ${height}" role="img" ${FONT}>`
  return `${open}\n<title>${title}</title>\n${drawn.join('\n')}\n</svg>\n`
}

const [file, directory = fileURLToPath(new URL('../../docs/images', import.meta.url))] = process.argv.slice(2)
if (!file) {
  console.error('usage: npx tsx bench/plots/draw.ts FILE [DIRECTORY]')
  process.exit(2)
}
const found = JSON.parse(readFileSync(file, 'utf8')) as Record<string, readonly Curve[]>
const panels: Panels = Object.entries(found).filter(([, curves]) => curves.length > 0)
writeFileSync(join(directory, 'refork-latency.svg'), latency(panels))
writeFileSync(join(directory, 'refork-memory.svg'), memory(panels))
