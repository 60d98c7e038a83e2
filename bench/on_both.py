"""Cases that are the same lines of Python for nbgrad and for torch: autograd, optimisers, steps.

``put`` copies a NumPy array into the library's own memory, ``network`` makes a model by name.
"""

from .data import normal, targets

__all__ = ["OPS"]

OPS = ("recorded_batch_norm", "recorded_cross_entropy", "recorded_norm", "optimizer_step",
       "training_step")


def recorded_batch_norm(lib, put, network, shape):
    """Batch norm recorded, and its three gradients."""
    C = shape[1]
    x, dy = (lib.as_tensor(put(normal(shape, seed))) for seed in (0, 1))
    gamma, beta = (lib.as_tensor(put(normal((C,), seed))) for seed in (3, 4))
    for leaf in (x, gamma, beta):
        leaf.requires_grad = True

    def run():
        x.grad = gamma.grad = beta.grad = None
        y = lib.nn.functional.batch_norm(x, None, None, gamma, beta, training=True)
        y.backward(dy)
        return y, x.grad, gamma.grad, beta.grad
    return run


def recorded_norm(lib, put, network, shape, f, settings):
    """A norm without parameters recorded, and its gradient."""
    x, dy = (lib.as_tensor(put(normal(shape, seed))) for seed in (0, 1))
    x.requires_grad = True
    call = getattr(lib.nn.functional, f)

    def run():
        x.grad = None
        y = call(x, **settings)
        y.backward(dy)
        return y, x.grad
    return run


def recorded_cross_entropy(lib, put, network, shape):
    """The mean loss recorded, and the gradient of the scores."""
    x, t = lib.as_tensor(put(normal(shape))), lib.as_tensor(targets(*shape))
    x.requires_grad = True

    def run():
        x.grad = None
        loss = lib.nn.functional.cross_entropy(x, t)
        loss.backward()
        return loss, x.grad
    return run


def dropout(lib, x):
    """Half of the values set to zero, the others doubled."""
    x = lib.as_tensor(x)

    def run():
        with lib.no_grad():
            return lib.nn.functional.dropout(x, 0.5)
    return run


def optimizer_step(lib, put, network, f, shapes):
    """One step over the parameters of a network, or over those of the given shapes."""
    if shapes is None:
        parameters = list(network("resnet20").parameters())
    else:
        parameters = [lib.nn.Parameter(lib.as_tensor(put(normal(s)))) for s in shapes]
    for i, p in enumerate(parameters):
        p.grad = lib.as_tensor(put(normal(tuple(p.shape), i)))
    kind, _, momentum = f.partition(" ")
    settings = {"momentum": 0.9} if momentum else {}
    optimizer = getattr(lib.optim, kind)(parameters, lr=1e-4, **settings)

    def run():
        optimizer.step()
        return parameters[-1]
    return run


def training_step(lib, put, network, model, batch, size):
    """Forward, loss, backward and an update by SGD with momentum."""
    lib.manual_seed(0)
    net = network(model)
    shape = {"resnet20": (batch, 3, size, size), "lenet": (batch, 1, size, size),
             "mlp": (batch, size * size)}[model]
    x, t = lib.as_tensor(put(normal(shape))), lib.as_tensor(targets(batch, 10))
    optimizer = lib.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    def run():
        optimizer.zero_grad()
        loss = lib.nn.functional.cross_entropy(net(x), t)
        loss.backward()
        optimizer.step()
        return loss
    return run
