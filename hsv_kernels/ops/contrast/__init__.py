"""NT-Xent and the logsumexp of similarities, in two forms.

The square holds rows against themselves and has its symmetry; NT-Xent is one. The rectangle holds queries against any
keys. Files that belong to one form say so in their names.
"""
