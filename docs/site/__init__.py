"""The documentation as a site: sources of the repository, staged for the generator, which is Zensical."""
