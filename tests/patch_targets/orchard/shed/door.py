"""In a namespace package inside of a regular one."""


def open_door():
    return "open"
