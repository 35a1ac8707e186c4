"""The ground floor of Covae: what training, export, serving and the client share. NumPy and Pillow, nothing heavier.

contract     every tensor on the wire, every operation
densities    the distributions over images, one algebra for NumPy, torch and graphs that are traced for export
backends     what differs between these three
noise        seeds to noise
images       image files in and out
errors       the base of every exception
"""
