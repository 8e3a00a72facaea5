// The routes. Answers are pages for people, and JSON under /api.
import view from '@fastify/view'
import Fastify from 'fastify'
import handlebars from 'handlebars'
import lodash from 'lodash'
import { z } from 'zod'

const Id = z.object({ id: z.coerce.number().int().positive() })
const Search = z.object({
  q: z.string().trim().min(1).max(100),
  limit: z.coerce.number().int().min(1).max(100).default(10),
})

handlebars.registerHelper('price', (cents) => (cents / 100).toFixed(2))

export async function buildServer(catalogue, log) {
  const server = Fastify({ loggerInstance: log })
  await server.register(view, {
    engine: { handlebars },
    root: new URL('templates', import.meta.url).pathname,
    layout: 'layout.hbs',
    production: true,
  })
  server.setErrorHandler((error, _request, reply) => {
    const status = error instanceof z.ZodError ? 400 : (error.statusCode ?? 500)
    const message = error instanceof z.ZodError ? error.issues.map((issue) => issue.message).join('; ') : error.message
    return reply.code(status).send({ status, message })
  })
  const missing = (reply, what) => reply.code(404).send({ status: 404, message: `no such ${what}` })
  const html = (reply, text) => reply.type('text/html; charset=utf-8').send(text)

  server.get('/', async (_request, reply) =>
    html(
      reply,
      await catalogue.page('/', () =>
        server.view('home.hbs', { title: 'Catalogue', categories: catalogue.categories() }),
      ),
    ),
  )

  server.get('/categories/:name', async (request, reply) => {
    const { name } = request.params
    const products = catalogue.inCategory(name)
    if (!products) return missing(reply, 'category')
    const render = () =>
      server.view('list.hbs', {
        title: lodash.startCase(name),
        total: products.length,
        products: products.slice(0, 50),
      })
    return html(reply, await catalogue.page(request.url, render))
  })

  server.get('/products/:id', async (request, reply) => {
    const product = catalogue.product(Id.parse(request.params).id)
    if (!product) return missing(reply, 'product')
    const render = () => server.view('product.hbs', { title: product.name, description: catalogue.describe(product) })
    return html(reply, await catalogue.page(request.url, render))
  })

  server.get('/search', async (request, reply) => {
    const { q, limit } = Search.parse(request.query)
    const { total, products } = catalogue.search(q, limit)
    return html(reply, await server.view('list.hbs', { title: `Search: ${q}`, total, products }))
  })

  server.get('/api/search', async (request) => {
    const { q, limit } = Search.parse(request.query)
    const { total, products } = catalogue.search(q, limit)
    return { total, products: products.map((product) => lodash.pick(product, ['id', 'name', 'priceCents'])) }
  })

  server.get('/api/status', async () => ({
    pid: process.pid,
    uptime: process.uptime(),
    cachedPages: catalogue.cachedPages(),
  }))

  await server.ready()
  return server
}
