"""Learned policies and their cards, installed as ``pyhealth.models.policies``.

:mod:`pyhealth.models.published_policies` loads them by name. The folder is a package so
that an editable install finds it, too.
"""
