// The catalogue: 50,000 products made from word lists, checked, grouped and indexed for search, and a cache of rendered
// pages. This file knows no server.
import { readFileSync } from 'node:fs'
import { addDays, format } from 'date-fns'
import yaml from 'js-yaml'
import lodash from 'lodash'
import { marked } from 'marked'
import MiniSearch from 'minisearch'
import { z } from 'zod'

const PRODUCTS = 50_000
const FIRST_DAY = new Date(2020, 0, 1)

const Product = z.object({
  id: z.number().int().positive(),
  name: z.string().min(3),
  category: z.string(),
  material: z.string(),
  colour: z.string(),
  priceCents: z.number().int().min(100),
  stock: z.number().int().nonnegative(),
  added: z.date(),
})

/** Numbers from 0 to below 1, the same at every start. */
function numbers(seed) {
  let state = seed
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state / 2 ** 32
  }
}

function makeProducts(words) {
  const next = numbers(42)
  const pick = (list) => list[Math.floor(next() * list.length)]
  const categories = Object.keys(words.categories)
  return Array.from({ length: PRODUCTS }, (_, i) => {
    const category = pick(categories)
    const [colour, material, adjective] = [pick(words.colours), pick(words.materials), pick(words.adjectives)]
    return Product.parse({
      id: i + 1,
      name: `${adjective} ${colour} ${material} ${pick(words.categories[category])}`,
      category,
      material,
      colour,
      priceCents: 100 + Math.floor(next() * 50_000),
      stock: Math.floor(next() * 200),
      added: addDays(FIRST_DAY, Math.floor(next() * 2000)),
    })
  })
}

export function loadCatalogue(log) {
  const started = performance.now()
  const words = yaml.load(readFileSync(new URL('data/words.yaml', import.meta.url), 'utf8'))
  const products = makeProducts(words)
  const byId = new Map(products.map((product) => [product.id, product]))
  const byCategory = lodash.mapValues(lodash.groupBy(products, 'category'), (group) =>
    lodash.sortBy(group, 'priceCents'),
  )
  const index = new MiniSearch({ fields: ['name', 'category'], searchOptions: { prefix: true, combineWith: 'AND' } })
  index.addAll(products)
  const pages = new Map()
  log.info({ products: products.length, ms: Math.round(performance.now() - started) }, 'catalogue loaded')

  return {
    product: (id) => byId.get(id),
    categories: () => Object.entries(byCategory).map(([name, group]) => ({ name, count: group.length })),
    inCategory: (name) => byCategory[name],
    search: (query, limit) => {
      const found = index.search(query)
      return { total: found.length, products: found.slice(0, limit).map(({ id }) => byId.get(id)) }
    },
    describe: (product) =>
      marked.parse(
        `**${product.name}**, made of *${product.material}*.\n\n` +
          `- price: ${(product.priceCents / 100).toFixed(2)}\n- in stock: ${product.stock}\n- since ${format(product.added, 'd MMMM yyyy')}\n`,
      ),
    /** A page from the cache, rendered first where it is not in it. */
    page: async (key, render) => {
      if (!pages.has(key)) pages.set(key, await render())
      return pages.get(key)
    },
    cachedPages: () => pages.size,
    async warmCache(get) {
      for (const name of Object.keys(byCategory)) await get(`/categories/${name}`)
      for (let id = 1; id <= 1000; id++) await get(`/products/${id}`)
      for (const colour of words.colours) await get(`/search?q=${colour}`)
    },
  }
}
